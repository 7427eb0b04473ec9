"""Answers of the proxy's own: a refusal, or what ends an answer that cannot go on."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_scaling_fixes.retry.failure import Failure, error_body, error_event
from sglang_scaling_fixes.retry.reply import ClientReply
from sglang_scaling_fixes.retry.routes import Family

RETRY_AFTER_S = 1
"""In the header of a 503, unless a worker asked for more."""
DO_NOT_RETRY = (b"x-should-retry", b"false")
"""The clients of OpenAI and Anthropic repeat a 503 by themselves, unless they are told this."""


@dataclass
class Refusal(Exception):
    """An error status with a body in the API's envelope. `after`: seconds, for a 503's header.

    `final`: a client that repeats requests by itself is told not to.
    """

    status: int
    type: str
    message: str
    after: int = RETRY_AFTER_S
    retryable: bool = False
    final: bool = False


def overloaded(message: str) -> Refusal:
    return Refusal(503, "overloaded", message, retryable=True)


async def send_refusal(reply: ClientReply, family: Family, refusal: Refusal) -> None:
    body = error_body(family, refusal.type, refusal.message, refusal.status, refusal.retryable)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if refusal.status == 503:
        headers.append((b"retry-after", str(refusal.after).encode()))
        if refusal.final or not refusal.retryable:
            headers.append(DO_NOT_RETRY)
    await reply.whole(refusal.status, headers, body)


async def send_failure(reply: ClientReply, family: Family, failure: Failure | None) -> None:
    """End the answer in whatever way is still open. `failure` is None if no worker was live.

    A 503 if the client has no byte; an error event in a stream. A body that is not a stream
    stays incomplete, so that its connection is cut and no client takes it for whole.
    """
    if not reply.started:
        refusal = Refusal(503, "no_worker", "no worker is live", retryable=True)
        if failure is not None:
            after = max(RETRY_AFTER_S, failure.retry_after or 0)
            refusal = Refusal(
                503, failure.type, failure.message, after, failure.retryable, failure.final
            )
        await send_refusal(reply, family, refusal)
    elif reply.stream is not None and failure is not None:
        event = error_event(family, failure, reply.stream.next_sequence)
        await reply.body(event, more=False)
