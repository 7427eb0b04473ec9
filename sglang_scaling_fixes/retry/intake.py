"""A client's request, read whole and within its limits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sglang_scaling_fixes.retry.budget import Lease
from sglang_scaling_fixes.retry.headers import headers_for_worker
from sglang_scaling_fixes.retry.refusal import Refusal, overloaded
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.routes import READ, Route
from sglang_scaling_fixes.retry.settings import ProxySettings

if TYPE_CHECKING:
    from starlette.types import Receive, Scope


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


async def read_request(
    scope: Scope, receive: Receive, route: Route, lease: Lease, settings: ProxySettings
) -> ClientRequest:
    """The whole request; `lease` covers its body. Raises Refusal, ClientGone."""
    try:
        async with asyncio.timeout(settings.idle_timeout):
            body = await _read_body(receive, lease, settings.max_body_bytes)
    except TimeoutError:
        raise Refusal(408, "request_timeout", "the request's body did not arrive") from None
    query: bytes = scope["query_string"]
    if not scope["raw_path"].startswith(b"/"):
        raise Refusal(400, "invalid_request_error", "the target is not a path")
    try:
        target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("ascii")
        headers = headers_for_worker(scope["headers"], inference=route is not READ)
    except UnicodeDecodeError:
        text = "a header is not UTF-8, or the target not ASCII"
        raise Refusal(400, "invalid_request_error", text) from None
    return ClientRequest(scope["method"], scope["path"], target, headers, body, route)


async def _read_body(receive: Receive, lease: Lease, limit: int) -> bytes:
    parts: list[bytes] = []
    size, fits, room, more = 0, True, True, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
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
        raise Refusal(413, "request_too_large", f"the body is larger than {limit} bytes")
    if not room:
        raise overloaded("the proxy has no memory left for one more request")
    return b"".join(parts)
