"""The messages whose destinations the ledger keeps back, until their rooms come free.

Used by the receive thread alone. Which one is due is the ledger's to say.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

from sglang_scaling_fixes.metrics import Metrics
from sglang_scaling_fixes.reclaim.rules.kept_back import KeptBack

logger = logging.getLogger(__name__)

Again = Callable[[], list[bytes] | None]
"""Reads a message again: the frames for stock, None when it is not for stock, or not yet."""


class KeptMessages:
    """By the ledger's key. `lock`: the ledger's."""

    def __init__(self, kept: KeptBack, lock: threading.Lock, metrics: Metrics) -> None:
        self._kept = kept
        self._lock = lock
        self._metrics = metrics
        self._messages: dict[Hashable, Again] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def keep(self, key: Hashable, again: Again) -> None:
        self._messages[key] = again

    def came(self, key: Hashable) -> None:
        """A message with this key is being read: the one before it is of no use any more."""
        self._messages.pop(key, None)

    def gave_up(self, lease: str) -> None:
        """Its owner did. It is read again, to be dropped, now and not when its room is free."""
        if (again := self._messages.pop(lease, None)) is not None:
            again()

    def next(self) -> list[bytes] | None:
        """The frames of one whose room is free by now."""
        while self._messages:
            with self._lock:
                key = self._kept.next()
            if key is None:
                return None
            if (frames := self._messages.pop(key)()) is not None:
                return frames
        return None

    def refused(self, room: int) -> None:
        """One more would have been too many."""
        if not self._metrics.report()["refused"]:
            logger.error(
                "safe-reclaim: room %d is in use, and %d requests wait for such rooms already: "
                "its new destinations are dropped, and that request will fail. Use a room once. "
                "From here on these are counted (reclaim_refused_total) and not logged",
                room,
                len(self),
            )
        self._metrics.inc("refused")
