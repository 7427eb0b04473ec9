"""A client's request, read whole and within its limits."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING

from sglang_scaling_fixes.retry.budget import Lease
from sglang_scaling_fixes.retry.headers import REQUEST_ID, headers_for_worker
from sglang_scaling_fixes.retry.refusal import Refusal, overloaded
from sglang_scaling_fixes.retry.request import (
    BodyFacts,
    ClientRequest,
    Steered,
    TooMany,
    body_facts,
)
from sglang_scaling_fixes.retry.routes import READ, Route
from sglang_scaling_fixes.retry.settings import ProxySettings

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

BODY_S = 30.0
"""How long a body may take, and as long again for every `BODY_S * LEAST_RATE` bytes of it."""
LEAST_RATE = 1 << 14
"""Bytes per second. A client that is slower keeps memory that others want."""
OFF_LOOP_BYTES = 1 << 18
"""From this size on a body is looked at in a thread."""


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


async def read_request(
    scope: Scope, receive: Receive, route: Route, lease: Lease, settings: ProxySettings
) -> ClientRequest:
    """The whole request; `lease` covers its body. Raises Refusal, ClientGone."""
    query: bytes = scope["query_string"]
    try:
        target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("ascii")
        headers = headers_for_worker(scope["headers"], inference=route is not READ)
    except UnicodeDecodeError:
        text = "a header is not UTF-8, or the target not ASCII"
        raise Refusal(400, "invalid_request_error", text) from None
    body = await _read_body(receive, lease, settings.max_body_bytes)
    facts = await _facts(scope["path"], body) if route.json else None
    encoded = headers.get("content-encoding", "identity") != "identity"
    if route.json and encoded:
        # SGLang parses the body whatever this header says.
        raise Refusal(415, "unsupported_encoding", "an encoded body cannot be read")
    if route.json and facts is None and body:
        # A lenient reader may find in it what a strict one does not, such as a bootstrap address.
        raise Refusal(400, "invalid_request_error", "the body is not a JSON object")
    # So that one name finds a request in all logs: the client's, the proxy's and the worker's.
    name = headers.get(REQUEST_ID) or _name(facts) or secrets.token_hex(16)
    headers.setdefault(REQUEST_ID, name)
    return ClientRequest(scope["method"], scope["path"], target, headers, body, route, facts, name)


def _name(facts: BodyFacts | None) -> str | None:
    rid = facts.rid if facts else None
    return rid if rid and re.fullmatch(r"[\x21-\x7e]{1,256}", rid) else None


async def _facts(path: str, body: bytes) -> BodyFacts | None:
    """Raises Refusal."""
    try:
        if len(body) < OFF_LOOP_BYTES:
            return body_facts(path, body)
        return await asyncio.to_thread(body_facts, path, body)
    except Steered as error:
        raise Refusal(400, "invalid_request_error", str(error)) from None
    except TooMany as error:
        raise Refusal(413, "request_too_large", str(error)) from None


async def _read_body(receive: Receive, lease: Lease, limit: int) -> bytes:
    """Raises Refusal, ClientGone."""
    parts: list[bytes] = []
    size, fits, room, more = 0, True, True, True
    clock = asyncio.get_running_loop().time
    until = clock() + BODY_S
    while more:
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            text = "the request's body did not arrive in time"
            raise Refusal(408, "request_timeout", text) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        until = min(until + len(part) / LEAST_RATE, clock() + BODY_S)
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
        raise Refusal(413, "request_too_large", f"the body is larger than {limit} bytes")
    if not room:
        raise overloaded("the proxy has no memory left for one more request")
    return b"".join(parts)
