"""How often a prefill rank may be asked while it says nothing.

An Abort travels on the socket stock uses for its own messages, because only there does
its place behind the destinations mean something. The socket's queue takes 1000
messages; one that a stalled rank does not empty must not fill up with questions, or
stock's next message blocks the scheduler.
"""

from __future__ import annotations

import threading

from sglang_scaling_fixes.reclaim.rules.types import Rank

UNHEARD = 64
"""Aborts to a rank without a word from it, before it is asked rarely."""
RARELY_S = 60.0
"""Seconds between two Aborts to it from then on: the queue then lasts for half a day."""

_HEARD = (0, 0.0)


class Pace:
    """Aborts per rank since its last word. `heard` comes from the receive thread, `may` from the
    scheduler's alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unheard: dict[Rank, tuple[int, float]] = {}
        """Aborts since the last word, and when the last one left (seconds, monotonic)."""

    def rests(self, rank: Rank, now: float) -> bool:
        """Whether `rank` was asked often enough for now."""
        count, last = self._unheard.get(rank, _HEARD)
        return count >= UNHEARD and now - last < RARELY_S

    def may(self, rank: Rank, now: float) -> bool:
        """Whether to ask `rank` now; the answer yes counts as asked."""
        if self.rests(rank, now):
            return False
        with self._lock:
            count, _ = self._unheard.get(rank, _HEARD)
            self._unheard[rank] = (count + 1, now)
            return True

    def heard(self, rank: Rank) -> None:
        """`rank` said something: it empties its queue."""
        with self._lock:
            self._unheard.pop(rank, None)
