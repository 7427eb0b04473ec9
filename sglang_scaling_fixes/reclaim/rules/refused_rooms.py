"""Rooms whose requests decode does not take, and whose requests have not come to prefill yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

REFUSED = "refused by the decode side (503): it takes no requests of this prefill at the moment"
REFUSED_S, REFUSED_MEMORY = 10.0, 4096
"""For how long (seconds) and for how many rooms a refusal waits for its request to come."""


class RefusedRooms:
    """A request that comes within REFUSED_S of decode's refusal ends at once."""

    def __init__(self) -> None:
        self._refused: OrderedDict[int, float] = OrderedDict()
        """Room -> when decode said so (seconds, monotonic)."""

    def remember(self, room: int, now: float) -> None:
        """Decode does not take the request of `room`, which is not here."""
        self._refused[room] = now
        if len(self._refused) > REFUSED_MEMORY:
            self._refused.popitem(last=False)

    def forget(self, room: int) -> None:
        """Decode takes it after all."""
        self._refused.pop(room, None)

    def take(self, room: int, now: float) -> bool:
        """A request of `room` came. Was it refused, a moment ago?"""
        at = self._refused.pop(room, None)
        return at is not None and now - at < REFUSED_S

    def __len__(self) -> int:
        return len(self._refused)

    def snapshot(self) -> Hashable:
        return tuple(self._refused)
