"""How far a replay is, on a terminal's stderr; elsewhere nothing."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH, EVERY = 30, 0.1
"""Characters of the bar; seconds between two pictures of it."""


class Bar:
    """Takes a pool's name, how many requests are done, and of how many."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shown = float("-inf")
        self._written = False

    def __call__(self, name: str, done: int, of: int) -> None:
        if not self._stream.isatty():
            return
        now = time.monotonic()
        if now - self._shown >= EVERY or done == of:
            self._shown, self._written = now, True
            filled = WIDTH * done // max(of, 1)
            bar = "#" * filled + "." * (WIDTH - filled)
            self._stream.write(f"\r{name:<9} [{bar}] {done:>6,} of {of:,}")
            self._stream.flush()

    def close(self) -> None:
        """Take the bar from the terminal."""
        if self._written:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
