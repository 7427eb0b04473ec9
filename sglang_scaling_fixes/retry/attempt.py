"""One request to one worker, or to both halves of a pair, over HTTP.

Every way in which it can fail is a `Failure`; whatever else a worker answers is the
client's. While the client has no byte of it (`Reply.started`), another attempt may
follow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from sglang_scaling_fixes.retry.budget import Budget, Lease
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.request import generations, parse, rendezvous
from sglang_scaling_fixes.retry.routes import Pairs, Route
from sglang_scaling_fixes.retry.settings import Settings, Target
from sglang_scaling_fixes.retry.stream import Stream
from sglang_scaling_fixes.retry.verdict import PAIR_RETRYABLE, RETRYABLE, judge_body

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_SENT_ON = HOP_BY_HOP | {"host", "content-length", "expect"}
"""Of a request: its body is whole by now, and HTTP says the rest anew."""

AFTER_THE_END = 5.0
"""Seconds a worker has to end the response once its last event was seen."""
PREFILL_GRACE = 1.0
"""Seconds a prefill may still take once its decode has answered in full."""
ERROR_BYTES = 1 << 20
"""Of an error body, this much is read for its verdict."""


@dataclass
class Request:
    """What the client sent. `target` is path and query, byte for byte."""

    method: str
    path: str
    target: str
    headers: CIMultiDict[str]
    body: bytes
    route: Route


class Reply:
    """The client's side. `sent` counts body bytes.

    `stream`: what is being passed on, if it is a stream: then an error can still be told
    after the start. `blocked_since`: when the write that is under way began, in seconds of
    the loop's clock; None if none is.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.on_start: Callable[[], None] = _nothing
        self._time = asyncio.get_running_loop().time
        self.stream: Stream | None = None
        self.blocked_since: float | None = None
        self.started = False
        self.complete = False
        self.sent = 0

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self.on_start()
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, more: bool) -> None:
        """Waits while the client is slow to read: so the worker is not read either."""
        self.sent += len(data)
        self.complete = not more
        self.blocked_since = self._time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.blocked_since = None

    async def whole(self, status: int, headers: Headers, data: bytes) -> None:
        await self.start(status, headers)
        await self.body(data, more=False)


@dataclass(frozen=True)
class _Call:
    """What one server is sent, and which statuses of it fail the attempt."""

    url: str
    body: bytes
    retryable: frozenset[int]


@dataclass
class _Refusal:
    """A prefill's answer that is the client's: not an error of the attempt, nor a success."""

    status: int
    headers: Headers
    body: bytes


class Attempts:
    """Makes attempts; `budget` is shared by all requests."""

    def __init__(self, session: aiohttp.ClientSession, settings: Settings, budget: Budget) -> None:
        self._session = session
        self._settings = settings
        self._budget = budget

    async def run(self, request: Request, target: Target, reply: Reply) -> None:
        """Returns when the client has its whole answer. Raises Failure."""
        lease = self._budget.lease()
        try:
            if target.pair is not None and request.route.pairs is Pairs.BOTH:
                await self._both(request, target, reply, lease)
            else:
                call = _Call(target.url, request.body, RETRYABLE)
                await self._answer(request, call, reply, lease)
        finally:
            lease.resize(0)

    async def _both(self, request: Request, target: Target, reply: Reply, lease: Lease) -> None:
        assert target.pair is not None
        said = parse(request.body) or {}
        body = rendezvous(request.path, request.body, said, target.pair)
        ahead = _Call(target.pair.prefill, body, PAIR_RETRYABLE)
        prefill = asyncio.create_task(self._prefill(request, ahead))
        answer = _Call(target.url, body, PAIR_RETRYABLE)
        decode = asyncio.create_task(self._answer(request, answer, reply, lease))
        try:
            await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
            # What a client has begun to read came after the KV arrived: it needs no prefill.
            if prefill.done() and not reply.started:
                refusal = await prefill
                if refusal is not None:
                    await _cancelled(decode)
                    await reply.whole(refusal.status, refusal.headers, refusal.body)
                    return
            await decode
            await asyncio.wait({prefill}, timeout=PREFILL_GRACE)
        finally:
            await _cancelled(decode, prefill)

    async def _prefill(self, request: Request, call: _Call) -> _Refusal | None:
        """Its own answer is not the client's, unless it refuses."""
        async with self._opened(request, call) as response:
            if response.status >= 400:
                held = await _at_most(response, ERROR_BYTES)
                after = _retry_after(response)
                if found := judge_body(response.status, held, after, call.retryable):
                    raise _of_half("prefill", found)
                headers = [h for h in _headers(response) if h[0].lower() != b"content-length"]
                headers.append((b"content-length", str(len(held)).encode()))
                return _Refusal(response.status, headers, held)
            stream = None
            if _is_stream(response):
                limit = self._settings.hold_bytes
                stream = Stream(request.route.family, 0, limit, 1, call.retryable)
            start = b""
            while chunk := await response.content.readany():
                if stream is not None and not stream.ended:
                    stream.feed(chunk)
                    if stream.failure is not None:
                        raise _of_half("prefill", stream.failure)
                elif len(start) < ERROR_BYTES:
                    start += chunk
            if stream is not None:
                if not stream.ended:
                    stream.close()
                found = stream.failure
            else:
                found = judge_body(response.status, start, None, call.retryable)
            if found is not None:
                raise _of_half("prefill", found)
        return None

    async def _answer(self, request: Request, call: _Call, reply: Reply, lease: Lease) -> None:
        async with self._opened(request, call) as response:
            if response.status == 200 and _is_stream(response):
                count = 1
                if self._settings.hold_tokens:
                    count = generations(request.path, parse(request.body))
                stream = Stream(
                    request.route.family,
                    self._settings.hold_tokens,
                    self._settings.hold_bytes,
                    count,
                    call.retryable,
                )
                await self._flow(response, stream, reply, lease)
            else:
                await self._whole(response, reply, lease, call.retryable)

    async def _flow(
        self, response: aiohttp.ClientResponse, stream: Stream, reply: Reply, lease: Lease
    ) -> None:
        content = response.content
        while not stream.ended:
            chunk = await content.readany()
            given = stream.feed(chunk) if chunk else stream.close()
            if given:
                if reply.stream is None:
                    reply.stream = stream
                    await reply.start(response.status, _headers(response))
                await reply.body(given, more=True)
            if stream.failure is not None:
                raise stream.failure
            if not lease.resize(stream.held):
                raise Failure(Reason.NO_MEMORY, "no memory is left here to hold more back")
        while chunk := await _rest(content):
            await reply.body(stream.feed(chunk), more=True)
        await reply.body(b"", more=False)

    async def _whole(
        self,
        response: aiohttp.ClientResponse,
        reply: Reply,
        lease: Lease,
        retryable: frozenset[int],
    ) -> None:
        """Held until it is complete, so that a break in its middle can be made good."""
        held: list[bytes] = []
        while chunk := await response.content.readany():
            size = lease.size + len(chunk)
            if not reply.started and size <= self._settings.hold_bytes and lease.resize(size):
                held.append(chunk)
                continue
            if not reply.started:
                await reply.start(response.status, _headers(response))
                for part in held:
                    await reply.body(part, more=True)
                held.clear()
                lease.resize(0)
            await reply.body(chunk, more=True)
        if not reply.started:
            body = b"".join(held)
            if found := judge_body(response.status, body, _retry_after(response), retryable):
                raise found
            await reply.start(response.status, _headers(response))
            await reply.body(body, more=False)
        else:
            await reply.body(b"", more=False)

    @contextlib.asynccontextmanager
    async def _opened(self, request: Request, call: _Call) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response, once its headers are here; everything that breaks it is a Failure."""
        response = None
        try:
            # The session's own limits do not cover a worker that never reads the request.
            async with asyncio.timeout(
                self._settings.connect_timeout + self._settings.idle_timeout
            ):
                response = await self._session.request(
                    request.method,
                    URL(call.url + request.target, encoded=True),
                    headers=request.headers,
                    data=call.body or None,
                    allow_redirects=False,
                )
            encoding = response.headers.get("Content-Encoding", "identity")
            if request.method in ("POST", "PUT") and encoding != "identity":
                raise Failure(
                    Reason.UNREADABLE, f"answered in {encoding!r}, which it was not asked for"
                )
            yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Failure(
                Reason.REFUSED, "no connection to the worker", detail=_words(error)
            ) from None
        except TimeoutError:
            idle = self._settings.idle_timeout
            raise Failure(Reason.TIMEOUT, f"not a byte from the worker for {idle:g} s") from None
        except aiohttp.ClientResponseError as error:
            raise Failure(
                Reason.UNREADABLE, "the worker does not speak HTTP", detail=error.message
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failure(
                Reason.LOST, "the connection to the worker broke", detail=_words(error)
            ) from None
        finally:
            if response is not None:
                # What was read to its end has gone back to the pool by itself.
                response.close()


def headers_to_send(raw: Iterable[tuple[bytes, bytes]], inference: bool) -> CIMultiDict[str]:
    """The client's own, without what belongs to its connection. Raises UnicodeDecodeError.

    A worker is not offered to compress what must be read here.
    """
    pairs = [(name.decode("latin-1"), value.decode()) for name, value in raw]
    named = _named_hop_by_hop(value for name, value in pairs if name == "connection")
    unwanted = _NOT_SENT_ON | named
    found = CIMultiDict(pair for pair in pairs if pair[0] not in unwanted)
    if inference and "accept-encoding" in found:
        found["accept-encoding"] = "identity"
    return found


def _headers(response: aiohttp.ClientResponse) -> Headers:
    named = _named_hop_by_hop(response.headers.getall("Connection", ()))
    unwanted = HOP_BY_HOP | named
    return [
        (name, value)
        for name, value in response.raw_headers
        if name.decode("latin-1").lower() not in unwanted
    ]


def _named_hop_by_hop(values: Iterable[str]) -> frozenset[str]:
    return frozenset(name.strip().lower() for value in values for name in value.split(","))


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    kind = response.headers.get("Content-Type", "")
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def _retry_after(response: aiohttp.ClientResponse) -> int | None:
    value = response.headers.get("Retry-After", "")
    return int(value) if value.isdecimal() and len(value) < 6 else None


async def _rest(content: aiohttp.StreamReader) -> bytes:
    """What follows the last event of a stream: the client's too, but no reason to fail."""
    try:
        async with asyncio.timeout(AFTER_THE_END):
            return await content.readany()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return b""


async def _at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    held = b""
    while len(held) < limit and (chunk := await response.content.readany()):
        held += chunk
    return held


def _of_half(which: str, found: Failure) -> Failure:
    return replace(found, message=f"{which}: {found.message}")


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _nothing() -> None:
    pass


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
