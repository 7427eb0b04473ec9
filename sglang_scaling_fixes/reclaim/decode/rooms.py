"""Two requests with one room on one decode: each sees its own transfer, and neither ends the other.

Stock keeps the state of a transfer by room, and forgets it when a receiver of that room is
cleared. A second request is therefore refused while a first one waits for its KV. Where one comes
all the same (a retracted request asks for its KV again under its own room, which another has
taken by then), each receiver is shown what is its own, and the last one clears the room.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.kv_poll import SUCCESS, WAITING
from sglang_scaling_fixes.passthrough import Passthrough
from sglang_scaling_fixes.reclaim.retry_after import TAKEN


class Rooms:
    """The receivers of one decode rank that stock has not cleared yet, by room."""

    def __init__(self, complete: Callable[[Any], bool]) -> None:
        self._complete = complete
        """Whether a receiver's own transfer has succeeded."""
        self._queue: Any = None
        self._uncleared: Counter[int] = Counter()
        """Room -> receivers made for it and not cleared. Too many where stock clears one never."""

    def watch(self, queue: Any) -> None:
        """Stock's preallocation queue, which knows what is really waiting."""
        self._queue = queue

    def made(self, receiver: Any) -> None:
        """Stock made a receiver."""
        self._uncleared[receiver.bootstrap_room] += 1

    def taken(self, room: int) -> bool:
        """Whether a request of `room` waits for its KV here. The same on all TP ranks."""
        return self._uncleared[room] > 0 and bool(self._waiting(room))

    def refusal(self, room: int) -> tuple[str, str] | None:
        """Why a new request of this room is not taken, None if it is: a word, a text."""
        if not self.taken(room):
            return None
        return "room", f"{TAKEN}: {room}; retry with a room of its own, or when that one has ended"

    def clear(self, stock: Callable[[Any], Any], receiver: Any) -> Any:
        """Stock forgets the room of `receiver`, unless it is another's by now.

        Stock clears some receivers twice, the second time long after the first.
        """
        room = receiver.bootstrap_room
        if not getattr(receiver, "sglang_scaling_fixes_cleared", False):
            receiver.sglang_scaling_fixes_cleared = True
            self._uncleared[room] -= 1
        if self._uncleared[room] > 0 and self._waiting(room):
            return None
        self._uncleared.pop(room, None)
        return stock(receiver)

    def _waiting(self, room: int) -> list[Any]:
        entries = (*self._queue.queue, *self._queue.transfer_queue.queue)
        receivers = (entry.kv_receiver for entry in entries)
        return [
            receiver
            for receiver in receivers
            if receiver is not None
            and receiver.bootstrap_room == room
            and not getattr(receiver, "sglang_scaling_fixes_cleared", False)
        ]

    def succeeded(self, stock: Callable[[Any], Any], receiver: Any) -> Any:
        """Stock's poll says success, which is shown only if it is this receiver's.

        Stock counts by room, and some time after the success was admitted: it may be another
        attempt's. Then this receiver's room waits on, for this receiver alone: stock's poll looks
        again, so that a time-out is noticed, and the state of the room stays what it is.
        """
        with getattr(receiver, "_lifecycle_lock", contextlib.nullcontext()):
            status = stock(receiver)  # again: it may have been aborted before the lock was ours
            if status != SUCCESS or self._complete(receiver):
                return status
            manager, receiver.conclude_state = receiver.kv_mgr, None
            receiver.kv_mgr = _Waits(manager, type(status)(WAITING))
            try:
                return stock(receiver)
            finally:
                receiver.kv_mgr = manager


class _Waits(Passthrough):
    """Stock's KV manager, for which every room waits for its KV."""

    def __init__(self, stock: Any, waiting: Any) -> None:
        super().__init__(stock)
        self._waiting = waiting

    def check_status(self, bootstrap_room: int) -> Any:
        del bootstrap_room
        return self._waiting
