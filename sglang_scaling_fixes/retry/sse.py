"""Server-sent events, cut out of the chunks in which they arrive.

An event ends with an empty line. Lines end with LF or CRLF. The format also allows a lone CR;
here it ends no line, because no server of these APIs sends one. A stream with lone CRs would be
held until it is too large, and never passed on unread.
"""

from __future__ import annotations

import re

_BLANK = re.compile(rb"\n\r?\n")


class TooLong(Exception):
    """An event is not complete within the limit."""


class Cutter:
    """Holds the beginning of an event until its end arrives, at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()

    @property
    def held(self) -> int:
        return len(self._rest)

    def cut(self, data: bytes) -> bytes:
        """The complete events, b"" if there is none. Raises TooLong."""
        rest = self._rest
        if not rest and b"\r" not in data and 0 <= data.find(b"\n\n") == len(data) - 2:
            return data  # one whole event, as servers send them
        searched = max(0, len(rest) - 2)
        rest += data
        end = 0
        for found in _BLANK.finditer(rest, searched):
            end = found.end()
        if len(rest) - end > self._limit:
            raise TooLong
        if not end:
            return b""
        whole = bytes(rest[:end])
        del rest[:end]
        return whole


def events(block: bytes) -> list[bytes]:
    """The events of `block`, which holds whole events only. Joined, they are `block`."""
    found, start = [], 0
    for blank in _BLANK.finditer(block):
        found.append(block[start : blank.end()])
        start = blank.end()
    return found


def data_of(event: bytes) -> bytes:
    """The value of the `data` lines, joined; b"" if there are none."""
    if event.startswith(b"data: ") and event.count(b"\n") == 2 and b"\r" not in event:
        return event[6:-2]
    lines = [line.removesuffix(b"\r") for line in event.split(b"\n")]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
