"""One worker's answer, passed on to the client or held back until it may be."""

from __future__ import annotations

import asyncio

import aiohttp

from sglang_scaling_fixes.retry.budget import Lease
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.headers import headers_for_client, is_event_stream, retry_after
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.stream import Stream
from sglang_scaling_fixes.retry.verdict import judge_body
from sglang_scaling_fixes.retry.worker_client import WorkerCall, WorkerClient

AFTER_END_S = 5.0
"""How long a worker may take to end the response after its last event."""


class Relay:
    """Passes answers on. `answer` does one; the other methods are its two kinds of body."""

    def __init__(self, client: WorkerClient, settings: ProxySettings) -> None:
        self._client = client
        self._settings = settings

    async def answer(
        self, request: ClientRequest, call: WorkerCall, reply: ClientReply, lease: Lease
    ) -> None:
        """Returns when the client has the whole answer. Raises Failure.

        `lease` covers what is held back.
        """
        async with self._client.call(request, call) as response:
            if response.status == 200 and is_event_stream(response):
                stream = Stream(
                    request.route.family,
                    self._settings.hold_tokens,
                    self._settings.hold_bytes,
                    request.generations if self._settings.hold_tokens else 1,
                    call.retryable,
                )
                await self._stream(response, stream, reply, lease)
            else:
                await self._body(response, reply, lease, call.retryable)

    async def _stream(
        self, response: aiohttp.ClientResponse, stream: Stream, reply: ClientReply, lease: Lease
    ) -> None:
        content = response.content
        while not stream.ended:
            chunk = await content.readany()
            released = stream.feed(chunk) if chunk else stream.close()
            if released:
                if reply.stream is None:
                    reply.stream = stream
                    await reply.start(response.status, headers_for_client(response))
                await reply.body(released, more=True)
            if stream.failure is not None:
                raise stream.failure
            if not lease.resize(stream.held):
                raise Failure(Reason.NO_MEMORY, "the proxy has no memory left to hold more back")
        while chunk := await _after_the_end(content):
            await reply.body(stream.feed(chunk), more=True)
        await reply.body(b"", more=False)

    async def _body(
        self,
        response: aiohttp.ClientResponse,
        reply: ClientReply,
        lease: Lease,
        retryable: frozenset[int],
    ) -> None:
        """Holds the body until it is complete: a break in its middle can then be retried."""
        held: list[bytes] = []
        while chunk := await response.content.readany():
            size = lease.size + len(chunk)
            if not reply.started and size <= self._settings.hold_bytes and lease.resize(size):
                held.append(chunk)
                continue
            if not reply.started:
                await reply.start(response.status, headers_for_client(response))
                for part in held:
                    await reply.body(part, more=True)
                held.clear()
                lease.resize(0)
            await reply.body(chunk, more=True)
        if reply.started:
            await reply.body(b"", more=False)
            return
        body = b"".join(held)
        if failure := judge_body(response.status, body, retry_after(response), retryable):
            raise failure
        await reply.start(response.status, headers_for_client(response))
        await reply.body(body, more=False)


async def _after_the_end(content: aiohttp.StreamReader) -> bytes:
    """What follows a stream's last event. It is the client's, but its loss is no failure."""
    try:
        async with asyncio.timeout(AFTER_END_S):
            return await content.readany()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return b""
