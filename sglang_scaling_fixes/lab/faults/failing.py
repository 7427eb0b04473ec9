"""A prefill of which one write in so many fails: it says so at once, and its bytes land later.

As a write that timed out: who asked for it hears of an error while the bytes are still on
their way. Loaded only where SGLANG_SCALING_FIXES_LAB_FAIL names a file. While that file is there,
one of each so many writes in a row fails, as many as the file says; which one is drawn, the same
ones in every run. Below everything that stock or the plugin puts around Mooncake's engine.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import FAIL

MODULE = "mooncake.engine"
LATE_S = 2.0
"""From the error to the bytes: a new owner may have the slots by then."""
_FAILED = {
    "transfer_sync_write": -1,
    "batch_transfer_sync_write": -1,
    "batch_transfer_async_write": 0,
}
"""What each way of writing returns for a write that failed."""


class OneInSoMany:
    """Which of the calls fail: one of each `of` in a row, drawn."""

    def __init__(self, seed: str = "failing") -> None:
        self._draw = random.Random(seed)
        self._left = 0
        self._fails = 0

    def next(self, of: int) -> bool:
        """Whether the next call fails."""
        if self._left == 0:
            self._left, self._fails = of, self._draw.randint(1, of)
        fails = self._left == self._fails
        self._left -= 1
        return fails


def install() -> None:
    if path := os.environ.get(FAIL):
        import_hooks.after_import(MODULE, attacher(Path(path)))


def attacher(
    path: Path, later: Callable[[Callable[[], Any]], None] | None = None
) -> Callable[[ModuleType], None]:
    """A hook for `MODULE`; `later` is given the rest of each failed write."""
    calls, lock = OneInSoMany(), threading.Lock()
    later = later or _after_a_while

    def due() -> bool:
        try:
            of = int(path.read_text())
        except OSError:
            return False
        with lock:
            return calls.next(of)

    def attach(module: ModuleType) -> None:
        engine: Any = module.TransferEngine
        for name, failed in _FAILED.items():
            setattr(engine, name, _failing(getattr(engine, name), failed, due, later))

    return attach


def _failing(
    stock: Callable[..., int],
    failed: int,
    due: Callable[[], bool],
    later: Callable[[Callable[[], Any]], None],
) -> Callable[..., int]:
    @functools.wraps(stock)
    def write(engine: Any, *args: Any, **kwargs: Any) -> int:
        if not due():
            return stock(engine, *args, **kwargs)
        later(lambda: stock(engine, *args, **kwargs))
        return failed

    return write


def _after_a_while(write: Callable[[], Any]) -> None:
    def run() -> None:
        time.sleep(LATE_S)
        write()

    threading.Thread(target=run, daemon=True).start()
