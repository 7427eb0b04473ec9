"""Requests that ended on prefill before their destinations came.

Decode may make room late. Its destinations then find no request and would wait for stock's
time-out. A room may be used again, and destinations may come before their own request: these must
not be failed because of the request before. So an ending is for destinations only if all of this
holds:

    E1  stock itself ended the room's request, or refused it: as failed, not as done
    E2  no newer request of the room has come
    E3  the request was at decode when it ended here, or came within `SKEW_S` of that: who uses a
        room again does so after it has ended
    E4  they are the first destinations of the room since

When in doubt nothing is told, and decode waits as without us. Only durations are compared: the two
machines' clocks need not agree. The way of a message makes a request look younger, which is doubt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

SKEW_S = 2.0
"""Seconds by which the halves of one request may come apart: a refusal on prefill takes none."""


class EndedRooms:
    """The last `memory` rooms whose request ended before its destinations came."""

    def __init__(self, memory: int = 4096) -> None:
        self._memory = memory
        self._ended: OrderedDict[int, tuple[float, str]] = OrderedDict()
        """Room -> when it ended (seconds, monotonic), and why."""

    def remember(self, room: int, now: float, reason: str) -> None:
        """The room's request ended, and no other request of the room waits (E1)."""
        self.forget(room)
        self._ended[room] = now, reason
        if len(self._ended) > self._memory:
            self._ended.popitem(last=False)

    def forget(self, room: int) -> None:
        """Another request of the room came (E2), or decode has given the ended one up."""
        self._ended.pop(room, None)

    def take(self, room: int, came: float | None) -> str:
        """Destinations came. Why their request has ended, empty if it has not or may not have.

        `came`: when the request came to decode (seconds, monotonic, of this process); None: it
        did not say.
        """
        at, reason = self._ended.pop(room, (0.0, ""))
        return reason if came is not None and came <= at + SKEW_S else ""

    def __len__(self) -> int:
        return len(self._ended)

    def snapshot(self) -> Hashable:
        return tuple(self._ended.items())
