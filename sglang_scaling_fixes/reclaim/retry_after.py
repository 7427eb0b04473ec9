"""`Retry-After` on the refusals of a decode that holds too much.

The refusal is made in the scheduler, as an aborted request with status 503; the
header can only be set where HTTP is spoken, in the main process. A refusal is known
by its text, so that stock's own 503s stay as they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sglang_scaling_fixes.reclaim.quarantine import RETRY_AFTER

REFUSAL = "safe-reclaim: this decode holds too many KV slots that a prefill may still write"
"""How the message of every such refusal begins."""

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RetryAfter:
    """ASGI middleware. Everything but a 503 passes unchanged and unbuffered."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None

        async def add(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] == 503:
                start = message  # its headers depend on the body that follows
                return
            if start is not None:
                if REFUSAL.encode() in message.get("body", b""):
                    header = (b"retry-after", str(RETRY_AFTER).encode())
                    start["headers"] = [*start.get("headers", ()), header]
                await send(start)
                start = None
            await send(message)

        await self._app(scope, receive, add)


def attach() -> None:
    """Add the middleware to stock's HTTP application right before it is run."""
    from sglang_scaling_fixes.attach import wrap_method

    def run(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from sglang.srt.entrypoints.http_server import app

        app.add_middleware(RetryAfter)
        return stock(*args, **kwargs)

    wrap_method("sglang.srt.entrypoints.http_server:_setup_and_run_http_server", run)
