"""What prefill remembers of each request, so that decode can accuse it by its room alone.

A room is a random number that only those who serve the request know. So a telling that names one
comes from a server that took part, and it accuses no more than that request computed or read. A
room that is not known is forgotten, or was never here: then nothing is moved.

No I/O.
"""

from __future__ import annotations

from collections import OrderedDict

from sglang_scaling_fixes.specguard.taint import Path

LIMIT = 131_072
"""Rooms remembered: two hours of requests at 18 a second, in about 40 MB."""


class Rooms:
    """The paths of the last requests, by room. A room that is used again means the last one."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._paths: OrderedDict[int, Path] = OrderedDict()

    def note(self, room: int, path: Path | None) -> None:
        """`path`: None if nothing of the request is shared."""
        self._paths.pop(room, None)
        if path is None:
            return
        self._paths[room] = path
        if len(self._paths) > self._limit:
            self._paths.popitem(last=False)

    def get(self, room: int) -> Path | None:
        return self._paths.get(room)
