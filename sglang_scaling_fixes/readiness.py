"""A server that takes no request says so where load balancers look.

Stock answers these paths by itself, also while a fix refuses every request in the scheduler. So
the schedulers are asked first, with stock's own question for `/server_info`. One that does not
answer in time leaves the word to stock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

PATHS = frozenset({"/health", "/health_generate", "/ready"})
"""`/ready` is there since 0.5.20."""
WAIT_S = 2.0

Report = Mapping[str, Any]
"""What the fixes of one scheduler report, by part."""
Judge = Callable[[Report], str | None]
"""Why a server with a scheduler that reports this takes no request, None if it does."""
Ask = Callable[[], Awaitable[Sequence[Report]]]


class Readiness:
    """ASGI middleware. Everything but a look at `PATHS` passes untouched."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        ask: Ask,
        judges: Sequence[Judge],
    ) -> None:
        self._app = app
        self._ask = ask
        self._judges = judges
        self._asking: asyncio.Task[Sequence[Report]] | None = None
        """One question at a time, and never cancelled: stock's would not be answered any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        looked = scope["type"] == "http" and scope["path"] in PATHS
        why = await self._unready() if looked else None
        if why is None:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        status = int(HTTPStatus.SERVICE_UNAVAILABLE)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": f"{why}\n".encode()})

    async def _unready(self) -> str | None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        await asyncio.wait([self._asking], timeout=WAIT_S)
        if not self._asking.done() or self._asking.exception() is not None:
            return None
        found = (judge(report) for report in self._asking.result() for judge in self._judges)
        return next((why for why in found if why is not None), None)


async def schedulers(key: str) -> Sequence[Report]:
    """What every scheduler of this server reports under `key`. Only decode refuses everybody."""
    from sglang.srt.entrypoints.http_server import get_global_state

    manager = get_global_state().tokenizer_manager
    if manager.server_args.disaggregation_mode != "decode":
        return []
    return [state.get(key) or {} for state in await manager.get_internal_state()]
