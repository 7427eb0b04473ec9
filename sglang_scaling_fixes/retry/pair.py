"""A prefill/decode pair: both halves get the request at once, and fail together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from sglang_scaling_fixes.retry.budget import Lease
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.headers import (
    Headers,
    headers_for_client,
    is_event_stream,
    retry_after,
)
from sglang_scaling_fixes.retry.relay import Relay
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.servers import Role
from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.stream import Stream
from sglang_scaling_fixes.retry.trail import RESUMED_HEADER, Continuation, refuse_resume
from sglang_scaling_fixes.retry.verdict import judge_body
from sglang_scaling_fixes.retry.worker_client import WorkerCall, WorkerClient

PREFILL_GRACE_S = 1.0
"""How long a prefill may go on after its decode has answered in full, or has said that prefill
ended the request."""
ENDED = "safe-reclaim: prefill ended this request"
"""Stands in decode's error if it did. Prefill's own answer says why, and may be a refusal."""
AILING = "safe-reclaim: this decode takes no requests of prefill"
"""Stands in the refusal of a decode that is well, and whose prefill is not."""
ERROR_BYTES = 1 << 20
"""How much of an error body is read to judge it."""


@dataclass
class _PrefillRefusal:
    """A refusal by prefill that is the client's answer: neither a failure nor a success."""

    status: int
    headers: Headers
    body: bytes


class PairAttempt:
    def __init__(self, client: WorkerClient, relay: Relay, settings: ProxySettings) -> None:
        self._client = client
        self._relay = relay
        self._settings = settings

    async def run(
        self,
        request: ClientRequest,
        prefill_call: WorkerCall,
        decode_call: WorkerCall,
        reply: ClientReply,
        lease: Lease,
    ) -> None:
        """Returns when the client has the whole answer. Raises Failure."""
        before = reply.sent
        prefill = asyncio.create_task(self._prefill(request, prefill_call, reply.so_far))
        decode = asyncio.create_task(self._decode(request, decode_call, reply, lease))
        try:
            await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
            if decode.done() and _ended_by_prefill(decode):
                await asyncio.wait({prefill}, timeout=PREFILL_GRACE_S)
            # Once the client has a byte of it, decode has the KV, and prefill no longer matters.
            if prefill.done() and reply.sent == before:
                refusal = await prefill
                if refusal is not None:
                    await _cancel(decode)
                    if reply.started:
                        text = f"prefill: status {refusal.status} in the middle of a stream"
                        raise Failure(Reason.ABORTED, text, half=Role.PREFILL)
                    refuse_resume(reply.so_far, refusal.status, refusal.body)
                    await reply.whole(refusal.status, refusal.headers, refusal.body)
                    return
            await decode
            await asyncio.wait({prefill}, timeout=PREFILL_GRACE_S)
        finally:
            await _cancel(decode, prefill)

    async def _decode(
        self, request: ClientRequest, call: WorkerCall, reply: ClientReply, lease: Lease
    ) -> None:
        try:
            await self._relay.answer(request, call, reply, lease)
        except Failure as failure:
            if failure.broke:
                raise replace(failure, half=Role.DECODE) from None
            if AILING in failure.message:
                raise replace(failure, half=Role.PREFILL) from None
            raise

    async def _prefill(
        self, request: ClientRequest, call: WorkerCall, so_far: Continuation | None
    ) -> _PrefillRefusal | None:
        """Reads and drops prefill's answer, unless it is a refusal. Raises Failure."""
        try:
            async with self._client.call(request, call) as response:
                if response.status < 300 and so_far is not None and so_far.begun:
                    refuse_fresh(so_far, response)
                if response.status >= 400:
                    return await _refusal(response, call)
                if is_event_stream(response):
                    await self._drain_stream(request, response, call)
                else:
                    await _drain_body(response, call)
        except Failure as failure:
            words = f"prefill: {failure.message}"
            raise replace(failure, message=words, half=Role.PREFILL) from None
        return None

    async def _drain_stream(
        self, request: ClientRequest, response: aiohttp.ClientResponse, call: WorkerCall
    ) -> None:
        limit = self._settings.hold_bytes
        stream = Stream(request.route.family, 0, limit, 1, call.retryable)
        while chunk := await response.content.readany():
            if not stream.ended:
                stream.feed(chunk)
                if stream.failure is not None:
                    raise stream.failure
        if not stream.ended:
            stream.close()
            if stream.failure is not None:
                raise stream.failure


def _ended_by_prefill(decode: asyncio.Task[None]) -> bool:
    error = decode.exception()
    return isinstance(error, Failure) and ENDED in error.message


async def _refusal(response: aiohttp.ClientResponse, call: WorkerCall) -> _PrefillRefusal:
    body = await _at_most(response, ERROR_BYTES)
    failure = judge_body(response.status, body, retry_after(response), call.retryable)
    if failure is not None:
        raise failure
    headers = [
        h for h in headers_for_client(response, call.url) if h[0].lower() != b"content-length"
    ]
    headers.append((b"content-length", str(len(body)).encode()))
    return _PrefillRefusal(response.status, headers, body)


async def _drain_body(response: aiohttp.ClientResponse, call: WorkerCall) -> None:
    start = await _at_most(response, ERROR_BYTES)
    while await response.content.readany():
        pass
    if failure := judge_body(response.status, start, None, call.retryable):
        raise failure


async def _at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    held = b""
    while len(held) < limit and (chunk := await response.content.readany()):
        held += chunk
    return held


def refuse_fresh(so_far: Continuation, response: aiohttp.ClientResponse) -> None:
    """Raises Failure if prefill computes the prompt alone, without the tokens so far."""
    if (
        so_far.plain is None
        and not so_far.off
        and response.headers.get(RESUMED_HEADER) != str(so_far.begun)
    ):
        raise Failure(Reason.ABORTED, "it cannot go on with a stream")


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
