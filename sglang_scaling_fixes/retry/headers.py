"""HTTP headers: which ones are passed on, and what the proxy reads from a worker's."""

from __future__ import annotations

from collections.abc import Iterable

import aiohttp
from multidict import CIMultiDict

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
_REQUEST_ONLY = frozenset({"host", "content-length", "expect"})
"""Also dropped from a request: its body is complete by now, so the HTTP client states them anew."""


def headers_for_worker(raw: Iterable[tuple[bytes, bytes]], inference: bool) -> CIMultiDict[str]:
    """The client's headers without those of its connection. Raises UnicodeDecodeError.

    With `inference` the worker is asked not to compress: the proxy has to read the answer.
    """
    pairs = [(name.decode("latin-1"), value.decode()) for name, value in raw]
    named = _named_hop_by_hop(value for name, value in pairs if name == "connection")
    dropped = HOP_BY_HOP | _REQUEST_ONLY | named
    kept = CIMultiDict(pair for pair in pairs if pair[0] not in dropped)
    if inference and "accept-encoding" in kept:
        kept["accept-encoding"] = "identity"
    return kept


def headers_for_client(response: aiohttp.ClientResponse) -> Headers:
    """The worker's headers without those of its connection."""
    dropped = HOP_BY_HOP | _named_hop_by_hop(response.headers.getall("Connection", ()))
    return [
        (name, value)
        for name, value in response.raw_headers
        if name.decode("latin-1").lower() not in dropped
    ]


def is_event_stream(response: aiohttp.ClientResponse) -> bool:
    kind = response.headers.get("Content-Type", "")
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def retry_after(response: aiohttp.ClientResponse) -> int | None:
    """Seconds. None if the worker names none, or names a date."""
    value = response.headers.get("Retry-After", "")
    return int(value) if value.isdecimal() and len(value) < 6 else None


def _named_hop_by_hop(values: Iterable[str]) -> frozenset[str]:
    return frozenset(name.strip().lower() for value in values for name in value.split(","))
