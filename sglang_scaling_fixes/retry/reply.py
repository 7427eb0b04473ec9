"""The client's side of a request: the answer, as far as it has been sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_scaling_fixes.retry.headers import Headers
from sglang_scaling_fixes.retry.stream import EventStream
from sglang_scaling_fixes.retry.trail import Continuation

if TYPE_CHECKING:
    from starlette.types import Send


class ClientReply:
    """Sends the answer and remembers what the client already has.

    `extra`: headers of every answer, whoever gives it; they replace those of a worker.
    `told`: the status of an error that was passed on within a successful answer.
    `started`: the client has the status, which is then `status`. `complete`: the client has
    everything.
    `sent`: body bytes so far.
    `stream`: the stream that is being passed on, if the answer is one; an error can then still
    be sent after the start, as an event. `so_far`: what another worker can go on with, if that
    was asked for.
    `blocked_since`: when the write now under way began, in seconds of the loop's clock; None
    while there is none.
    """

    def __init__(self, send: Send, extra: Headers | None = None) -> None:
        self._send = send
        self.extra = extra or []
        self.status = 0
        self.told: int | None = None
        self.on_start: Callable[[], None] = _nothing
        self._time = asyncio.get_running_loop().time
        self.stream: EventStream | None = None
        self.so_far: Continuation | None = None
        self.blocked_since: float | None = None
        self.started = False
        self.complete = False
        self.sent = 0

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self.status = status
        self.on_start()
        if self.extra:
            ours = {name for name, _ in self.extra}
            headers = [*(h for h in headers if h[0].lower() not in ours), *self.extra]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, more: bool) -> None:
        """Waits while the client reads slowly. The worker is not read meanwhile either."""
        self.sent += len(data)
        self.complete = not more
        self.blocked_since = self._time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.blocked_since = None

    async def whole(self, status: int, headers: Headers, data: bytes) -> None:
        await self.start(status, headers)
        await self.body(data, more=False)


def _nothing() -> None:
    pass
