"""Our middleware around stock's HTTP application, in the main process of a server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_scaling_fixes import fixes, points, readiness, refusals
from sglang_scaling_fixes.attach import wrap


def attach(report_key: str) -> None:
    """Add it right before the application is run. `report_key`: ours in a scheduler's state."""

    def run(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from sglang.srt.entrypoints.http_server import app

        edits = [edit for fix in fixes.FIXES for edit in fix.error_edits()]
        app.add_middleware(refusals.Refusals, edits=edits)
        judges = [fix.unready for fix in fixes.FIXES]
        ask = partial(readiness.schedulers, report_key)
        app.add_middleware(readiness.Readiness, ask=ask, judges=judges)
        return stock(*args, **kwargs)

    wrap(points.RUN_HTTP, run)
