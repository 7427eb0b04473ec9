"""Watches KV slots inside the decode server's scheduler, from outside the transfer path.

`lab.boot` loads this where SGLANG_SCALING_FIXES_LAB_OBSERVE names a file.  One
JSON line per event (`events.Kind`).

`admitted` and `final` carry one CRC-32 per prompt token, over the bytes of that token's
slot in every registered KV buffer.  The buffers are the ones stock hands to the transfer engine,
so that what is digested is exactly what a remote write can touch.  A request that
was never admitted has no digests, only its slots; one that was retracted and resumed has
several `final` events.

Nothing is replaced or delayed on the way of a transfer: both hooks run in the
scheduler's own loop, and transfers run in other threads and processes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import time
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sglang_scaling_fixes.lab.observing.events import Kind

MODULE = "sglang.srt.disaggregation.decode"
POOL_S = 0.1


def attacher(path: str) -> Callable[[ModuleType], None]:
    """A hook for `MODULE` that makes its transfer queue report to file `path`."""

    def attach(module: ModuleType) -> None:
        queue_class: Any = module.DecodeTransferQueue
        stock_pop = queue_class.pop_transferred
        stock_extend = queue_class.extend

        def observer_of(queue: Any) -> Observer:
            observer: Observer | None = queue.__dict__.get("_lab_observer")
            if observer is None:
                observer = queue._lab_observer = Observer(
                    path, queue.scheduler, queue.req_to_metadata_buffer_idx_allocator
                )
            return observer

        @functools.wraps(stock_pop)
        def pop_transferred(self: Any, *args: Any, **kwargs: Any) -> Any:
            observer = observer_of(self)
            observer.pool()
            popped = stock_pop(self, *args, **kwargs)
            for req in popped:
                observer.admitted(req)
            return popped

        @functools.wraps(stock_extend)
        def extend(self: Any, entries: Any) -> Any:
            for entry in entries:
                observer_of(self).exposed(entry.req)
            return stock_extend(self, entries)

        queue_class.pop_transferred = pop_transferred
        queue_class.extend = extend

    return attach


def losses(path: str) -> Callable[[int], None]:
    """What a lossy socket calls with the room of a message it has dropped."""
    return lambda room: _append(path, {"event": Kind.LOST, "bootstrap_room": room})


class Observer:
    """Digests the slots of one scheduler's requests."""

    def __init__(self, path: str, scheduler: Any, metadata: Any) -> None:
        self._path = path
        self._rank = int(getattr(scheduler, "tp_rank", 0) or 0)
        self._rows = scheduler.req_to_token_pool
        allocator = scheduler.token_to_kv_pool_allocator
        self._page = int(allocator.page_size)
        pointers, _sizes, item_bytes = allocator.get_kvcache().get_contiguous_buf_infos()
        self._buffers = list(zip(pointers, item_bytes, strict=True))
        self._open: dict[str, list[int]] = {}
        self._retracted: set[str] = set()
        self._allocators = (allocator, metadata)
        self._free: tuple[int, ...] = ()
        self._next_count = 0.0
        self._watch_release()

    def _watch_release(self) -> None:
        stock_free = self._rows.free

        @functools.wraps(stock_free)
        def free(req: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(req, "rid"):
                self.final(req)
            return stock_free(req, *args, **kwargs)

        self._rows.free = free

    def pool(self) -> None:
        """Once per scheduler iteration: count what is free, ten times a second at most."""
        now = time.time()
        if now < self._next_count:
            return
        self._next_count = now + POOL_S
        free = tuple(int(allocator.available_size()) for allocator in self._allocators)
        if free != self._free:
            self._free = free
            tokens, metadata = free
            event = {"event": Kind.POOL, "free_tokens": tokens, "free_metadata": metadata}
            _append(self._path, {**event, "time": now})

    def exposed(self, req: Any) -> None:
        self._write(Kind.EXPOSED, req, self._slots(req), None)

    def admitted(self, req: Any) -> None:
        slots = self._slots(req)
        self._open[req.rid] = slots
        self._write(Kind.ADMITTED, req, slots, self._digests(slots))

    def final(self, req: Any) -> None:
        slots = self._open.pop(req.rid, None)
        if slots is None and req.rid in self._retracted:  # resumed, in other slots
            slots = self._slots(req)
        if slots is None:
            self._write(Kind.FINAL, req, self._slots(req), None)
            return
        self._write(Kind.FINAL, req, slots, self._digests(slots))
        if req.finished():
            self._retracted.discard(req.rid)
        else:
            self._retracted.add(req.rid)

    def _slots(self, req: Any) -> list[int]:
        kv = getattr(req, "kv", None)
        row = getattr(kv, "req_pool_idx", None)
        if row is None:
            row = getattr(req, "req_pool_idx", None)
        if row is None:
            return []
        n_prompt = len(req.origin_input_ids)
        slots: list[int] = self._rows.req_to_token[row, :n_prompt].tolist()
        return slots

    def _digests(self, slots: list[int]) -> list[int]:
        digests = []
        for slot in slots:
            digest = 0
            page, offset = divmod(slot, self._page)
            for pointer, item_bytes in self._buffers:
                size = item_bytes // self._page
                address = pointer + page * item_bytes + offset * size
                digest = zlib.crc32(ctypes.string_at(address, size), digest)
            digests.append(digest)
        return digests

    def _write(self, event: Kind, req: Any, slots: list[int], digests: list[int] | None) -> None:
        _append(
            self._path,
            {
                "event": event,
                "time": time.time(),
                "rank": self._rank,
                "rid": req.rid,
                "bootstrap_room": req.bootstrap_room,
                "n_prompt": len(req.origin_input_ids),
                "slots": slots,
                "digests": digests,
            },
        )


def _append(path: str, event: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(event).encode() + b"\n")
    finally:
        os.close(descriptor)
