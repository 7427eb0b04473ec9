"""Broadcasts that take their time, as over a busy link: each split layer arrives late.

Loaded only where SGLANG_SCALING_FIXES_LAB_SLOW_BROADCAST gives the seconds for a layer.
"""

from __future__ import annotations

import os
import time
from types import ModuleType
from typing import Any

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import SLOW


def install() -> None:
    if asked := os.environ.get(SLOW):
        seconds = _seconds(asked)
        import_hooks.after_import("sglang_scaling_fixes.layersplit.lane", _slowed(seconds))


def _seconds(asked: str) -> float:
    try:
        return float(asked)
    except ValueError:
        raise SystemExit(f"{SLOW}={asked!r} is not a number of seconds") from None


def _slowed(seconds: float) -> Any:
    def slow(module: ModuleType) -> None:
        launch = module.ThreadLane.launch

        def late(lane: Any, work: Any, *used: Any) -> Any:
            def slowly() -> None:
                time.sleep(seconds)
                work()

            return launch(lane, slowly, *used)

        module.ThreadLane.launch = late

    return slow
