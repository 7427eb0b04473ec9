"""One name for an answer that several workers wrote: ids, times and numbers of its events.

The first worker's are the answer's. A later worker's are replaced by them, in whole JSON objects:

    /generate                  meta_info.id
    completions, chat          id, created
    responses                  response.id and created_at, item ids by output_index, call ids,
                               sequence_number

Events of the first worker are not changed by a byte.
"""

from __future__ import annotations

from typing import Any

import orjson

from sglang_scaling_fixes.retry.sse import data_of


class Names:
    def __init__(self) -> None:
        self._top: dict[str, Any] = {}
        self._meta: dict[str, Any] = {}
        self._response: dict[str, Any] = {}
        self._items: dict[int, dict[str, Any]] = {}
        self.next_sequence = 0
        """The number after that of the last event; 0 where events have none."""

    def rewritten(self, event: bytes, *, continued: bool) -> bytes:
        """The event as the client gets it. `continued`: a later worker wrote it."""
        data = data_of(event)
        try:
            said = orjson.loads(data)
        except orjson.JSONDecodeError:
            return event
        if not isinstance(said, dict):
            return event
        changed = self._learn_or_change(said, continued)
        if isinstance(said.get("sequence_number"), int):
            if continued:
                said["sequence_number"] = self.next_sequence
                changed = True
            self.next_sequence = said["sequence_number"] + 1
        return event.replace(data, orjson.dumps(said), 1) if changed else event

    def _learn_or_change(self, said: dict[str, Any], continued: bool) -> bool:
        changed = _align(self._top, said, ("id", "created"), continued)
        meta = said.get("meta_info")
        if isinstance(meta, dict):
            changed |= _align(self._meta, meta, ("id",), continued)
        response = said.get("response")
        if isinstance(response, dict):
            changed |= _align(self._response, response, ("id", "created_at"), continued)
            output = response.get("output")
            for place, item in enumerate(output if isinstance(output, list) else ()):
                changed |= self._item(place, item, continued)
        index = said.get("output_index")
        if isinstance(index, int):
            if "item" in said:
                changed |= self._item(index, said["item"], continued)
            if "item_id" in said:
                item = {"id": said["item_id"]}
                changed |= self._item(index, item, continued)
                said["item_id"] = item["id"]
        return changed

    def _item(self, index: int, item: Any, continued: bool) -> bool:
        if not isinstance(item, dict):
            return False
        return _align(self._items.setdefault(index, {}), item, ("id", "call_id"), continued)


def _align(
    known: dict[str, Any], said: dict[str, Any], names: tuple[str, ...], change: bool
) -> bool:
    """Learn what is not known yet; with `change` replace what is. Whether anything was replaced."""
    changed = False
    for name in names:
        if name not in said or said[name] is None:
            continue
        if name not in known:
            known[name] = said[name]
        elif change and known[name] != said[name]:
            said[name] = known[name]
            changed = True
    return changed
