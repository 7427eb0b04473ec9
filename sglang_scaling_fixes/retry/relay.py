"""One worker's answer, passed on to the client or held back until it may be."""

from __future__ import annotations

import asyncio

import aiohttp

from sglang_scaling_fixes.retry.budget import Lease
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.headers import headers_for_client, is_event_stream, retry_after
from sglang_scaling_fixes.retry.patience import OutOfPatience, Patience
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.stream import EventStream, Stream
from sglang_scaling_fixes.retry.trail import (
    PATHS,
    RESUMED_HEADER,
    WITHOUT_FIX,
    PlainStream,
    TrailStream,
    go_on_without,
    refuse_resume,
)
from sglang_scaling_fixes.retry.verdict import judge_body, told_in_body
from sglang_scaling_fixes.retry.worker_client import WorkerCall, WorkerClient

AFTER_END_S = 5.0
"""How long a worker may take to end the response after its last event."""
BLOCK_BYTES = 1 << 16
"""Read and written at once: what one stopped client can keep in memory depends on it."""


class Relay:
    """Passes answers on. `answer` does one; the other methods are its two kinds of body."""

    def __init__(self, client: WorkerClient, settings: ProxySettings) -> None:
        self._client = client
        self._settings = settings

    async def answer(
        self, request: ClientRequest, call: WorkerCall, reply: ClientReply, lease: Lease
    ) -> None:
        """Returns when the client has the whole answer. Raises Failure.

        `lease` covers what is held back, and what waits for a client that does not read.
        """
        began = asyncio.get_running_loop().time()
        streams = request.facts is not None and request.facts.stream and request.path in PATHS
        # Stock sends the headers of some streams with their first token.
        within = self._settings.first_token_timeout if streams else None
        async with self._client.call(request, call, within=within) as response:
            if response.status == 200 and is_event_stream(response):
                stream = self._new_stream(request, call, response, reply)
                passing = _PassingStream(self._settings, call.url, stream, reply, lease)
                await passing.run(response, began)
            else:
                await self._body(call, response, reply, lease)

    def _new_stream(
        self,
        request: ClientRequest,
        call: WorkerCall,
        response: aiohttp.ClientResponse,
        reply: ClientReply,
    ) -> EventStream:
        """Raises Failure if the worker begins an answer that the client has the beginning of."""
        family, limit = request.route.family, self._settings.hold_bytes
        so_far = reply.so_far
        if so_far is not None and not so_far.off:
            if response.headers.get(RESUMED_HEADER) == str(so_far.begun):
                return TrailStream(family, so_far, limit, call.retryable)
            if so_far.plain is None and reply.started and so_far.begun:
                so_far.no_more(WITHOUT_FIX)
                raise Failure(Reason.ABORTED, "the worker cannot go on with a stream")
            if so_far.plain is None or not so_far.ids:
                go_on_without(so_far, request)
            if not so_far.off:
                return PlainStream(family, so_far, limit, call.retryable)
        generations = request.generations if self._settings.hold_tokens else 1
        return Stream(family, self._settings.hold_tokens, limit, generations, call.retryable)

    async def _body(
        self,
        call: WorkerCall,
        response: aiohttp.ClientResponse,
        reply: ClientReply,
        lease: Lease,
    ) -> None:
        """Holds the body until it is complete: a break in its middle can then be retried.

        Raises Failure, and NotResumable.
        """
        if reply.started:
            raise Failure(Reason.ABORTED, f"status {response.status} in the middle of a stream")
        held: list[bytes] = []
        while chunk := await response.content.read(BLOCK_BYTES):
            size = lease.size + len(chunk)
            if not reply.started and size <= self._settings.hold_bytes and lease.resize(size):
                held.append(chunk)
                continue
            if not reply.started:
                await reply.start(response.status, headers_for_client(response, call.url))
                for part in held:
                    await reply.body(part, more=True)
                held.clear()
                lease.resize(0)
            await reply.body(chunk, more=True)
        if reply.started:
            await reply.body(b"", more=False)
            return
        body = b"".join(held)
        refuse_resume(reply.so_far, response.status, body)
        if failure := judge_body(response.status, body, retry_after(response), call.retryable):
            raise failure
        if response.status < 400:
            reply.told = told_in_body(body)
        await reply.start(response.status, headers_for_client(response, call.url))
        await reply.body(body, more=False)


class _PassingStream:
    """One stream on its way. It is given up if its worker sends comments only."""

    def __init__(
        self,
        settings: ProxySettings,
        url: str,
        stream: EventStream,
        reply: ClientReply,
        lease: Lease,
    ) -> None:
        self._settings = settings
        self._url = url
        self._stream = stream
        self._reply = reply
        self._lease = lease
        self._patience = Patience()

    async def run(self, response: aiohttp.ClientResponse, began: float) -> None:
        """Returns when the client has all of it. Raises Failure.

        `began`: when it was asked for, by the loop's clock.
        """
        try:
            with self._patience:
                waited = asyncio.get_running_loop().time() - began  # for the headers
                self._patience.wait(self._settings.first_token_timeout - waited)
                await self._events(response)
        except OutOfPatience:
            which = "next" if self._stream.progress else "first"
            text = f"the worker did not send the {which} event in time"
            raise Failure(Reason.TIMEOUT, text) from None
        until = asyncio.get_running_loop().time() + AFTER_END_S
        while chunk := await _after_the_end(response.content, until):
            await self._reply.body(self._stream.feed(chunk), more=True)
        await self._reply.body(b"", more=False)

    async def _events(self, response: aiohttp.ClientResponse) -> None:
        stream, patience = self._stream, self._patience
        between = self._settings.token_timeout
        seen = 0
        unread = 0  # bytes of the last block: the client may not have read it yet
        while not stream.ended:
            chunk = await response.content.read(BLOCK_BYTES)
            released = stream.feed(chunk) if chunk else stream.close()
            if released:
                self._hold(stream.held + unread + len(released))
                patience.pause()  # the client may read slowly
                await self._give(response, released)
                patience.resume()
                unread = len(released)
            if stream.progress != seen:
                seen = stream.progress
                patience.wait(between)
            if stream.failure is not None:
                raise stream.failure
            self._hold(stream.held + unread)

    async def _give(self, response: aiohttp.ClientResponse, released: bytes) -> None:
        self._reply.stream = self._stream
        if not self._reply.started:
            headers = headers_for_client(response, self._url)
            # What is taken out of a stream would not be in its length.
            headers = [header for header in headers if header[0].lower() != b"content-length"]
            await self._reply.start(response.status, headers)
        await self._reply.body(released, more=True)

    def _hold(self, size: int) -> None:
        if not self._lease.resize(size):
            text = "the proxy has no memory left to hold more back"
            raise Failure(Reason.NO_MEMORY, text)


async def _after_the_end(content: aiohttp.StreamReader, until: float) -> bytes:
    """What follows a stream's last event. It is the client's, but its loss is no failure."""
    try:
        async with asyncio.timeout_at(until):
            return await content.readany()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return b""
