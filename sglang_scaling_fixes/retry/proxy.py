"""The ASGI application: attempts in turn, one answer, and never two beginnings of it.

Not a framework's application: a stream's events pass through here one by one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from sglang_scaling_fixes.retry import metrics
from sglang_scaling_fixes.retry.attempt import Attempts, Reply, Request, headers_to_send
from sglang_scaling_fixes.retry.budget import Budget, Lease
from sglang_scaling_fixes.retry.failure import Failure, Reason, error_body, error_event
from sglang_scaling_fixes.retry.request import parse, request_id
from sglang_scaling_fixes.retry.routes import READ, Family, Pairs, Route, route
from sglang_scaling_fixes.retry.settings import Settings
from sglang_scaling_fixes.retry.workers import State, Worker, Workers

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("sglang_scaling_fixes.retry")

RETRY_AFTER = 1
"""Seconds, in the header of a 503, unless a worker asked for more."""
PROBE_SECONDS = 10.0
"""A stock /health may generate a token first."""
TICK = 0.25
"""Seconds between two looks at who is to be probed and whose client stopped reading."""
KEEP_ALIVE = 2.0
"""Seconds an idle connection to a worker is kept; a stock worker closes it after 5."""


@dataclass
class _Refused(Exception):
    """An error of the proxy's own. `after`: seconds, for the header of a 503."""

    status: int
    kind: str
    message: str
    after: int = RETRY_AFTER
    retryable: bool = False


class _Gone(Exception):
    """The client left before its request was complete."""


class RetryProxy:
    """One event loop's worth of proxy. `workers` and `budget` are there to be looked at."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.workers = Workers(settings.targets)
        self.budget = Budget(settings.max_held_bytes)
        self._registry = CollectorRegistry()
        self._metrics = metrics.retry_proxy(self._registry)
        self._running: dict[Reply, asyncio.Task[str]] = {}
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._attempts: Attempts | None = None

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
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=self._settings.connect_timeout,
                sock_read=self._settings.idle_timeout,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        self._attempts = Attempts(self._session, self._settings, self.budget)
        self._spawn(self._look_after())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    # One request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        if scope["method"] in ("GET", "HEAD") and scope["path"] in ("/health", "/metrics"):
            await (self._health if scope["path"] == "/health" else self._exposition)(reply)
            return
        found = route(scope["method"], scope["path"])
        lease = self.budget.lease()
        outcome = "refused"
        try:
            if found is None:
                raise _Refused(
                    501,
                    "not_proxied",
                    f"{scope['method']} {scope['path']} concerns one worker and is not spread "
                    "over many here; send it to each worker itself",
                )
            if self._in_flight >= self._settings.max_inflight:
                raise _overloaded("too many requests are in flight here")
            self._in_flight += 1
            try:
                request = await self._read(scope, receive, found, lease)
                outcome = await self._watched(request, receive, reply)
            finally:
                self._in_flight -= 1
        except _Refused as refusal:
            await _tell(reply, (found or READ).family, refusal)
        except _Gone:
            outcome = "disconnected"
        finally:
            lease.resize(0)
            self._metrics["requests"].labels(outcome=outcome).inc()

    async def _read(self, scope: Scope, receive: Receive, found: Route, lease: Lease) -> Request:
        """The whole request. Raises _Refused, _Gone."""
        try:
            async with asyncio.timeout(self._settings.idle_timeout):
                body = await self._read_body(receive, lease)
        except TimeoutError:
            raise _Refused(408, "request_timeout", "the request's body did not arrive") from None
        inference = found is not READ
        query: bytes = scope["query_string"]
        if not scope["raw_path"].startswith(b"/"):
            raise _Refused(400, "invalid_request_error", "the target is not a path")
        try:
            target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("ascii")
            headers = headers_to_send(scope["headers"], inference)
        except UnicodeDecodeError:
            text = "a header is not UTF-8, or the target not ASCII"
            raise _Refused(400, "invalid_request_error", text) from None
        return Request(scope["method"], scope["path"], target, headers, body, found)

    async def _read_body(self, receive: Receive, lease: Lease) -> bytes:
        parts: list[bytes] = []
        limit = self._settings.max_body_bytes
        size, fits, room, more = 0, True, True, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(part)
            fits = fits and size <= limit
            room = room and (not fits or lease.resize(size))
            if fits and room:
                parts.append(part)
                continue
            parts.clear()
            lease.resize(0)
            # Read on for a while, or the client may see a reset instead of the answer.
            if size > 2 * limit:
                break
        if not fits:
            raise _Refused(413, "request_too_large", f"the body is larger than {limit} bytes")
        if not room:
            raise _overloaded("no memory is left here for one more request")
        return b"".join(parts)

    def _alone(self, request: Request) -> bool:
        """Whether no pair can serve it. Raises _Refused if nothing but pairs is there."""
        pairs = [worker for worker in self.workers.all if worker.target.pair]
        if not pairs or request.route.pairs is Pairs.DECODE:
            return False
        refusal = None
        if request.route.pairs is Pairs.NONE:
            text = f"{request.path} needs a worker that is not half of a pair"
            refusal = _Refused(501, "not_proxied", text)
        elif request.headers.get("content-encoding", "identity") != "identity":
            text = "a pair's room cannot be put into an encoded body"
            refusal = _Refused(415, "unsupported_encoding", text)
        elif parse(request.body) is None:
            refusal = _Refused(400, "invalid_request_error", "the body is not a JSON object")
        if refusal is not None and len(pairs) == len(self.workers.all):
            raise refusal
        return refusal is not None

    async def _watched(self, request: Request, receive: Receive, reply: Reply) -> str:
        """The outcome. A client that leaves ends the work, and with it the worker's."""
        work = asyncio.create_task(self._work(request, reply))
        gone = asyncio.create_task(_disconnected(receive))
        self._running[reply] = work
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if reply.complete:  # the client has it all, and may well be gone by now
                await asyncio.wait({work})
            if work.done() and not work.cancelled():
                return work.result()
            raise _Gone
        except asyncio.CancelledError:  # the grace period is over
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if not reply.complete:
                lost = Failure(Reason.LOST, "the proxy is being stopped")
                await self._finish(request, reply, lost)
            raise
        finally:
            del self._running[reply]
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, request: Request, reply: Reply) -> str:
        assert self._attempts is not None
        begun = time.monotonic()
        reply.on_start = lambda: self._metrics["first_byte_seconds"].observe(
            time.monotonic() - begun
        )
        tried: list[Worker] = []
        failure: Failure | None = None
        alone = self._alone(request)
        while len(tried) < self._settings.attempts:
            worker = self.workers.pick(tried, time.monotonic(), alone=alone)
            if worker is None:
                break
            if failure is not None:
                self._log(request, tried, failure, reply, "retried")
            tried.append(worker)
            worker.in_flight += 1
            try:
                await self._attempts.run(request, worker.target, reply)
            except Failure as found:
                failure = found
                self._note(worker, found)
                if reply.started:
                    self._log(request, tried, found, reply, "told")
                    await self._finish(request, reply, found)
                    return "broken"
                if not found.elsewhere:
                    break
            else:
                self.workers.answered(worker)
                if failure is None:
                    return "ok"
                if reply.stream is not None:
                    self._metrics["stream_restarts"].inc()
                return "recovered"
            finally:
                worker.in_flight -= 1
        if failure is not None:
            self._log(request, tried, failure, reply, "told")
        else:
            _say(event="no_worker", request=_name_of(request))
        await self._finish(request, reply, failure)
        return "failed"

    async def _finish(self, request: Request, reply: Reply, failure: Failure | None) -> None:
        """Tell the client, in whatever way is still open, that there is no more."""
        family = request.route.family
        if not reply.started:
            refusal = _Refused(503, "no_worker", "no worker is live", retryable=True)
            if failure is not None:
                after = max(RETRY_AFTER, failure.retry_after or 0)
                refusal = _Refused(503, failure.type, failure.message, after, failure.retryable)
            await _tell(reply, family, refusal)
        elif reply.stream is not None and failure is not None:
            event = error_event(family, failure, reply.stream.next_sequence)
            await reply.body(event, more=False)
        # Else it is half a body: left incomplete, it is cut off, which no client takes for whole.

    # Workers

    def _note(self, worker: Worker, failure: Failure) -> None:
        now = time.monotonic()
        longest = self._settings.avoid_seconds
        if failure.reason is Reason.ANOMALY:
            self._metrics["anomalies"].labels(worker=worker.target.name).inc()
            self.workers.avoid(worker, now + longest)
        elif failure.reason is Reason.UNAVAILABLE:
            # Whoever refuses everything has the fewest requests in flight; not next, then.
            self.workers.avoid(worker, now + min(longest, failure.retry_after or RETRY_AFTER))
        elif failure.broke and self.workers.broke(worker, now):
            _say(event="down", worker=worker.target.name, reason=failure.reason.value)

    async def _look_after(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TICK)
            for worker in self.workers.due(time.monotonic()):
                self._spawn(self._probe(worker))
            limit = loop.time() - self._settings.idle_timeout
            for reply, task in self._running.items():
                if reply.blocked_since is not None and reply.blocked_since < limit:
                    task.cancel()

    async def _probe(self, worker: Worker) -> None:
        alive = False
        try:
            alive = await self._healthy(worker)
        finally:
            self.workers.probed(worker, alive, time.monotonic())
        if alive:
            _say(event="up", worker=worker.target.name)

    async def _healthy(self, worker: Worker) -> bool:
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        for url in worker.target.urls:
            try:
                async with self._session.get(url + "/health", timeout=limit) as response:
                    if response.status >= 500:
                        return False
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What is told about it

    async def _health(self, reply: Reply) -> None:
        now = time.monotonic()
        workers = [
            {"worker": w.target.name, "state": w.state(now).value, "in_flight": w.in_flight}
            for w in self.workers.all
        ]
        body = json.dumps({"live": self.workers.live(now), "workers": workers}).encode()
        status = 200 if self.workers.live(now) else 503
        await reply.whole(status, [(b"content-type", b"application/json")], body)

    async def _exposition(self, reply: Reply) -> None:
        now = time.monotonic()
        for worker in self.workers.all:
            up = worker.state(now) is not State.DOWN
            self._metrics["worker_up"].labels(worker=worker.target.name).set(up)
        self._metrics["inflight"].set(self._in_flight)
        self._metrics["held_bytes"].set(self.budget.held)
        kind = [(b"content-type", CONTENT_TYPE_LATEST.encode())]
        await reply.whole(200, kind, generate_latest(self._registry))

    def _log(
        self, request: Request, tried: list[Worker], failure: Failure, reply: Reply, outcome: str
    ) -> None:
        """Count and log that the last one tried has failed."""
        self._metrics["retries"].labels(reason=failure.reason.value, outcome=outcome).inc()
        _say(
            event="attempt_failed",
            outcome=outcome,
            request=_name_of(request),
            worker=tried[-1].target.name,
            reason=failure.reason.value,
            attempt=len(tried),
            sent_bytes=reply.sent,
            message=(failure.detail or failure.message)[:200],
        )


def _overloaded(message: str) -> _Refused:
    return _Refused(503, "overloaded", message, retryable=True)


async def _tell(reply: Reply, family: Family, refusal: _Refused) -> None:
    body = error_body(family, refusal.kind, refusal.message, refusal.status, refusal.retryable)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if refusal.status == 503:
        headers.append((b"retry-after", str(refusal.after).encode()))
    await reply.whole(refusal.status, headers, body)


def _name_of(request: Request) -> str | None:
    return request_id(request.headers.get("x-request-id"), request.body)


def _say(**fields: object) -> None:
    logger.warning(json.dumps(fields))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
