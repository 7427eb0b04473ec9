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
    """`Scheduler.on_idle` runs each time stock's loop found no batch to run, on every release."""
    on_idle = module.Scheduler.on_idle

    @functools.wraps(on_idle)
    def resting(scheduler: Any) -> Any:
        found = on_idle(scheduler)
        time.sleep(REST_S)
        return found

    module.Scheduler.on_idle = resting
