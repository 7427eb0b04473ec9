"""Stock's own ABORT and its acknowledgement, for `--safe-reclaim-peer stock-ack`.

From 0.5.19 a stock prefill with deferred release on answers ABORT when the room has
drained, with three frames or more: tag, room, prefill rank. The two-frame answer of
releases before, or with deferred release off, says "received" and proves nothing.
Stock sends its ABORT once; here it is repeated while slots are held for it.

The operator decides to believe it: the answer names no attempt, a reused room
confuses it, and up to 0.5.21 one follows a failed write.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from sglang_scaling_fixes.reclaim.rules.types import Rank
from sglang_scaling_fixes.reclaim.stock_wire import is_number

_MAX_WAIT_S = 5.0
_MEMORY = 65536


@dataclass
class _Room:
    sent: dict[Rank, list[bytes]] = field(default_factory=dict)
    acked: set[bytes] = field(default_factory=set)
    expected: int = 0
    """AbortAcks that make it drained: all ranks told, those without a part in it as well."""
    wait: float = 0.0
    next: float = 0.0


class StockAborts:
    """ABORTs that stock sent for rooms whose slots are held. Times in seconds, monotonic."""

    def __init__(self, first_wait: float) -> None:
        self._first_wait = first_wait
        self._rooms: dict[int, _Room] = {}
        self._doubtful: OrderedDict[int, None] = OrderedDict()
        """Rooms aborted without slots: the answer may come when the room is used again."""

    def sent(self, room: int, rank: Rank, frames: list[bytes]) -> None:
        """Stock sends its ABORT of `room` to `rank`."""
        self._rooms.setdefault(room, _Room()).sent[rank] = list(frames)

    def unexposed(self, room: int) -> None:
        """Stock sends its ABORT of a room that has no slots here: no answer for it counts."""
        self._doubtful[room] = None
        if len(self._doubtful) > _MEMORY:
            self._doubtful.popitem(last=False)

    def watch(self, room: int, expected: int) -> None:
        """The slots of `room` are withheld; `expected` prefill ranks have to answer."""
        found = self._rooms.setdefault(room, _Room())
        found.expected, found.wait = expected, self._first_wait

    def acked(self, frames: list[bytes]) -> tuple[int, int] | None:
        """An answer came. The room and how many ranks have answered, once all that must have."""
        if len(frames) < 3 or not is_number(frames[1]):
            return None
        room = int(frames[1])
        if (found := self._rooms.get(room)) is None or room in self._doubtful:
            return None
        found.acked.add(frames[2])
        count = len(found.acked)
        return (room, count) if 0 < found.expected <= count else None

    def due(self, now: float) -> list[tuple[Rank, list[bytes]]]:
        """ABORTs to repeat."""
        again: list[tuple[Rank, list[bytes]]] = []
        for found in list(self._rooms.values()):  # stock may abort from a thread of its own
            if found.expected and found.next <= now:
                if found.next:
                    again += found.sent.items()
                found.next = now + found.wait
                found.wait = min(_MAX_WAIT_S, 2 * found.wait)
        return again

    def forget(self, room: int) -> None:
        """The slots of `room` are back."""
        self._rooms.pop(room, None)
