"""The ASGI application: routes and limits, and the watch over each request's client.

It uses no web framework, because every event of every stream passes through here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST

from sglang_scaling_fixes.retry.attempt import Attempts
from sglang_scaling_fixes.retry.budget import Budget, Lease
from sglang_scaling_fixes.retry.dispatch import Dispatcher
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.health import HealthProber, health_report
from sglang_scaling_fixes.retry.intake import ClientGone, read_request
from sglang_scaling_fixes.retry.refusal import Refusal, overloaded, send_failure, send_refusal
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.routes import READ, Route, route
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.telemetry import Telemetry
from sglang_scaling_fixes.retry.worker_client import new_session
from sglang_scaling_fixes.retry.workers import Workers

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

TICK_S = 0.25
"""Between two looks at which clients have stopped reading."""


class RetryProxy:
    """One event loop's proxy. `workers` and `budget` are public: tests and operators look."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self.workers = Workers(settings.targets)
        self.budget = Budget(settings.max_held_bytes)
        self._telemetry = Telemetry()
        self._running: dict[ClientReply, asyncio.Task[str]] = {}
        self._in_flight = 0
        self._dispatcher: Dispatcher | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1011, "reason": "not proxied"})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with new_session(self._settings) as session:
            attempts = Attempts(session, self._settings, self.budget)
            self._dispatcher = Dispatcher(self._settings, self.workers, attempts, self._telemetry)
            background = [
                asyncio.create_task(HealthProber(self.workers, session).run()),
                asyncio.create_task(self._end_blocked_replies()),
            ]
            await send({"type": "lifespan.startup.complete"})
            await receive()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = ClientReply(send)
        reads = scope["method"] in ("GET", "HEAD")
        if reads and scope["path"] == "/health":
            await self._send_health(reply)
            return
        if reads and scope["path"] == "/metrics":
            await self._send_metrics(reply)
            return
        found = route(scope["method"], scope["path"])
        family = (found or READ).family
        lease = self.budget.lease()
        outcome = "refused"
        try:
            if found is None:
                raise _not_proxied(scope)
            outcome = await self._limited(scope, receive, found, lease, reply)
        except Refusal as refusal:
            await send_refusal(reply, family, refusal)
        except ClientGone:
            outcome = "disconnected"
        finally:
            lease.resize(0)
            self._telemetry.request_ended(outcome)

    async def _limited(
        self, scope: Scope, receive: Receive, found: Route, lease: Lease, reply: ClientReply
    ) -> str:
        """The outcome. Raises Refusal, ClientGone."""
        if self._in_flight >= self._settings.max_inflight:
            raise overloaded("too many requests are in flight in the proxy")
        self._in_flight += 1
        try:
            request = await read_request(scope, receive, found, lease, self._settings)
            return await self._watched(request, receive, reply)
        finally:
            self._in_flight -= 1

    async def _watched(self, request: ClientRequest, receive: Receive, reply: ClientReply) -> str:
        """The outcome. A client that leaves ends the attempt, and with it the worker's work.

        Raises Refusal, ClientGone.
        """
        assert self._dispatcher is not None, "ASGI servers start the lifespan first"
        work = asyncio.create_task(self._dispatcher.run(request, reply))
        gone = asyncio.create_task(_disconnected(receive))
        self._running[reply] = work
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if reply.complete:  # the client may leave now: it has everything
                await asyncio.wait({work})
            if work.done() and not work.cancelled():
                return work.result()
            raise ClientGone
        except asyncio.CancelledError:  # the grace period is over
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if not reply.complete:
                lost = Failure(Reason.LOST, "the proxy is being stopped")
                await send_failure(reply, request.route.family, lost)
            raise
        finally:
            del self._running[reply]
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _end_blocked_replies(self) -> None:
        """Until cancelled: end the requests whose client has not read for `idle_timeout`."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK_S)
            limit = loop.time() - self._settings.idle_timeout
            for reply, work in self._running.items():
                if reply.blocked_since is not None and reply.blocked_since < limit:
                    work.cancel()

    async def _send_health(self, reply: ClientReply) -> None:
        status, body = health_report(self.workers)
        await reply.whole(status, [(b"content-type", b"application/json")], body)

    async def _send_metrics(self, reply: ClientReply) -> None:
        body = self._telemetry.exposition(self.workers, self._in_flight, self.budget.held)
        await reply.whole(200, [(b"content-type", CONTENT_TYPE_LATEST.encode())], body)


def _not_proxied(scope: Scope) -> Refusal:
    return Refusal(
        501,
        "not_proxied",
        f"{scope['method']} {scope['path']} concerns one worker, and the proxy sends no call to "
        "all of them; send it to each worker itself",
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
