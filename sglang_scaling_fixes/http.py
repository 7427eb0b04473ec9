"""Our middleware around stock's HTTP application, in the main process of a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sglang_scaling_fixes import machine, points, readiness, refusals
from sglang_scaling_fixes.attach import wrap
from sglang_scaling_fixes.routes import Answer, Routes


def spoken_elsewhere(tokenizer_workers: int | None) -> str | None:
    """What has HTTP spoken by processes that load no plugins; None if this server's main one does.

    `tokenizer_workers`: of `--tokenizer-worker-num`.
    """
    if (tokenizer_workers or 1) > 1:
        return "--tokenizer-worker-num above 1"
    if machine.here.env.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        return "SGLANG_RUST_SERVER"
    return None


def attach(
    edits: Sequence[refusals.Edit],
    judges: Sequence[readiness.Judge],
    report_key: str,
    routes: Mapping[str, Answer],
    inner: Callable[[], Sequence[Any]],
) -> None:
    """Add it right before the application is run. `report_key`: ours in a scheduler's state.

    `inner`: what stands between stock's own middleware and its routes, asked for then.
    """

    def run(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from sglang.srt.entrypoints.http_server import app
        from starlette.middleware import Middleware

        app.user_middleware.extend(Middleware(each) for each in inner())
        app.add_middleware(refusals.Refusals, edits=edits)
        ask = partial(readiness.schedulers, report_key)
        app.add_middleware(readiness.Readiness, ask=ask, judges=judges)
        app.add_middleware(Routes, answers=routes)
        return stock(*args, **kwargs)

    wrap(points.RUN_HTTP, run)
