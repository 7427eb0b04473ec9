"""Destinations that wait until the attempt before them in their room is over.

Only their keys are here; what arrived is kept by the adapter. They are found by room, so that
one event costs one step, however many wait: when a room comes free its first is due, and when
that one has been tried, the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class KeptBack:
    """Keys by room, in the order they came; never more than `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rooms: dict[int, OrderedDict[Hashable, None]] = {}
        self._room_of: dict[Hashable, int] = {}
        self._due: OrderedDict[int, None] = OrderedDict()
        """Rooms whose first may be tried."""

    def __len__(self) -> int:
        return len(self._room_of)

    def keep(self, room: int, key: Hashable, *, again: bool = False) -> bool:
        """`key` has to wait. False: too many do already.

        `again`: it was tried, and is the first of its room as before.
        """
        if len(self) >= self._limit and not again:
            return False
        keys = self._rooms.setdefault(room, OrderedDict())
        keys[key] = None
        self._room_of[key] = room
        if again:
            keys.move_to_end(key, last=False)
        return True

    def drop(self, key: Hashable) -> bool:
        """`key` does not wait any more. False: it did not."""
        room = self._room_of.pop(key, None)
        if room is None:
            return False
        keys = self._rooms[room]
        del keys[key]
        if not keys:
            del self._rooms[room]
            self._due.pop(room, None)
        return True

    def came_free(self, room: int) -> None:
        """What waits for this room may be tried."""
        if room in self._rooms:
            self._due[room] = None

    @property
    def due(self) -> bool:
        """Whether there is something to try now."""
        return bool(self._due)

    def next(self) -> Hashable | None:
        """A key to try now: its destinations are to be bound again. None: there is none."""
        if not self._due:
            return None
        room, _ = self._due.popitem(last=False)
        return next(iter(self._rooms[room]))

    def stranded(self, in_use: dict[int, bool]) -> list[int]:
        """Rooms that are not in use, in which something waits that nobody will try."""
        return [room for room in self._rooms if room not in self._due and not in_use.get(room)]

    def snapshot(self) -> Hashable:
        """All that it knows."""
        return tuple((r, *keys) for r, keys in sorted(self._rooms.items())), tuple(self._due)
