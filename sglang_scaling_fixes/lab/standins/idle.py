"""A scheduler with nothing to run gives its core away for a moment, each time it looks.

Stock's loop never rests: on a machine of its own that costs nothing. Here all servers of a lab
share a core or two, and one that waits for a transfer would slow the one that sends it. Stock's
`--sleep-on-idle` does not help there: it rests only while no request is known at all.
"""

from __future__ import annotations

import functools
import time
from types import ModuleType
from typing import Any

from sglang_scaling_fixes import import_hooks

REST_S = 0.005
"""Far below what any race or time-out of the lab waits for."""


def install() -> None:
    import_hooks.after_import("sglang.srt.managers.scheduler", rest_when_idle)


def rest_when_idle(module: ModuleType) -> None:
    """One method runs each time stock's loop found no batch to run: `on_idle`, since 0.5.11."""
    name = "on_idle" if hasattr(module.Scheduler, "on_idle") else "self_check_during_idle"
    stock = getattr(module.Scheduler, name)

    @functools.wraps(stock)
    def resting(scheduler: Any) -> Any:
        found = stock(scheduler)
        time.sleep(REST_S)
        return found

    setattr(module.Scheduler, name, resting)
