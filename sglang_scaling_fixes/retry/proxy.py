"""The ASGI application: routes and limits, and the watch over each request's client.

It uses no web framework, because every event of every stream passes through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST

from sglang_scaling_fixes.retry.attempt import Attempts
from sglang_scaling_fixes.retry.budget import Budget, Lease
from sglang_scaling_fixes.retry.discovery import Discovery
from sglang_scaling_fixes.retry.dispatch import Dispatcher
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.headers import REQUEST_ID, Headers
from sglang_scaling_fixes.retry.health import HealthProber, health_report
from sglang_scaling_fixes.retry.intake import ClientGone, read_request
from sglang_scaling_fixes.retry.refusal import Refusal, overloaded, send_failure, send_refusal
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.routes import READ, Route, route
from sglang_scaling_fixes.retry.servers import Server
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.telemetry import Telemetry
from sglang_scaling_fixes.retry.withdrawal import Withdrawals
from sglang_scaling_fixes.retry.worker_client import Sessions
from sglang_scaling_fixes.retry.workers import Workers

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

TICK_S = 0.25
"""Between two looks at which clients have stopped reading."""
DEFAULT_IN_FLIGHT = 1024
"""Where nobody says what the limit of open files allows."""


class RetryProxy:
    """One event loop's proxy. `workers` and `budget` are public: tests and operators look.

    `read`: the list of servers anew, for `reload`. `draining`: /health says 503, and requests
    are still served. `admin`: the application of a port of its own for health and metrics.
    """

    def __init__(
        self, settings: ProxySettings, read: Callable[[], list[Server]] | None = None
    ) -> None:
        self._settings = settings
        self.workers = Workers(server for server in settings.servers if not server.dns)
        self.budget = Budget(settings.max_held_bytes)
        self.draining = False
        self._discovery = Discovery(
            self.workers, settings.servers, read or (lambda: list(settings.servers))
        )
        self._telemetry = Telemetry()
        self._running: dict[ClientReply, asyncio.Task[str]] = {}
        self._in_flight = 0
        self._limit = settings.max_inflight or DEFAULT_IN_FLIGHT
        self._dispatcher: Dispatcher | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1011, "reason": "not proxied"})

    async def admin(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Health with the workers' addresses, and metrics; nothing else."""
        if scope["type"] != "http":
            return
        reply = ClientReply(send)
        if not await self._own(scope, reply, names=True, metrics=True):
            await send_refusal(reply, READ.family, Refusal(404, "not_found", "not served here"))

    async def reload(self) -> None:
        """Read the list of workers again."""
        await self._discovery.reload()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with Sessions(self._settings) as sessions:
            withdrawals = Withdrawals(sessions.pooled)
            attempts = Attempts(sessions, self._settings, self.budget)
            self._dispatcher = Dispatcher(
                self._settings, self.workers, attempts, self._telemetry, withdrawals
            )
            await self._discovery.look_up()
            prober = HealthProber(self.workers, sessions.fresh, self._settings)
            background = [
                asyncio.create_task(prober.run()),
                asyncio.create_task(self._end_blocked_replies()),
            ]
            if any(server.dns for server in self._settings.servers) or self._settings.workers_file:
                background.append(asyncio.create_task(self._discovery.run()))
            await send({"type": "lifespan.startup.complete"})
            await receive()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await withdrawals.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = ClientReply(send, _every_answer(scope))
        own_port = self._settings.admin_port is not None
        if await self._own(scope, reply, names=False, metrics=not own_port):
            return
        found = route(scope["method"], scope["raw_path"].decode("ascii", "replace"))
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

    async def _own(self, scope: Scope, reply: ClientReply, *, names: bool, metrics: bool) -> bool:
        """Answer what concerns the proxy itself. False if this is none of it."""
        if scope["method"] not in ("GET", "HEAD"):
            return False
        if scope["path"] == "/health":
            status, body = health_report(self.workers, draining=self.draining, names=names)
            await reply.whole(status, [(b"content-type", b"application/json")], body)
        elif scope["path"] == "/metrics" and metrics:
            body = self._telemetry.exposition(self.workers, self._in_flight, self.budget.held)
            await reply.whole(200, [(b"content-type", CONTENT_TYPE_LATEST.encode())], body)
        else:
            return False
        return True

    async def _limited(
        self, scope: Scope, receive: Receive, found: Route, lease: Lease, reply: ClientReply
    ) -> str:
        """The outcome. Raises Refusal, ClientGone.

        A request counts once its body is whole: one that is never sent takes nobody's place.
        """
        if self._in_flight >= self._limit:
            raise overloaded("too many requests are in flight in the proxy")
        request = await read_request(scope, receive, found, lease, self._settings)
        if self._in_flight >= self._limit:
            raise overloaded("too many requests are in flight in the proxy")
        reply.extra = [
            (REQUEST_ID.encode(), request.name.encode("latin-1", "replace")),
            *reply.extra,
        ]
        self._in_flight += 1
        try:
            return await self._watched(request, receive, reply)
        finally:
            self._in_flight -= 1

    async def _watched(self, request: ClientRequest, receive: Receive, reply: ClientReply) -> str:
        """The outcome. A client that leaves ends the attempt, and with it the worker's work.

        Raises Refusal, ClientGone.
        """
        assert self._dispatcher is not None, "ASGI servers start the lifespan first"
        work = asyncio.create_task(self._dispatcher.run(request, reply, self._in_flight))
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


def _every_answer(scope: Scope) -> Headers:
    """A browser shows an answer of another site only if it says that it may.

    Stock says so of all of its answers, and so the proxy does of its own.
    """
    if any(name == b"origin" for name, _ in scope["headers"]):
        return [(b"access-control-allow-origin", b"*")]
    return []


def _not_proxied(scope: Scope) -> Refusal:
    if not scope["raw_path"].startswith(b"/"):
        return Refusal(400, "invalid_request_error", "the target is not a path")
    return Refusal(
        501,
        "not_proxied",
        f"{scope['method']} {scope['path']} concerns one worker, or is not written plainly; the "
        "proxy sends no call to all of them; send it to each worker itself",
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
