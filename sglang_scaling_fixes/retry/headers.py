"""HTTP headers: which ones are passed on, and what the proxy reads from a worker's."""

from __future__ import annotations

from collections.abc import Iterable

import aiohttp
from multidict import CIMultiDict

from sglang_scaling_fixes import vouch

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
_ROUTING = frozenset(
    {
        "x-data-parallel-rank",
        "x-override-routed-dp-rank",
        "x-override-disagg-prefill-dp-rank",
        vouch.HEADER,
    }
)
"""What a server takes from whoever balances: no client's reaches a worker."""
REQUEST_ID = "x-request-id"


def headers_for_worker(raw: Iterable[tuple[bytes, bytes]], inference: bool) -> CIMultiDict[str]:
    """The client's headers without those of its connection. Raises UnicodeDecodeError.

    With `inference` the worker is asked not to compress: the proxy has to read the answer.
    """
    pairs = [(name.decode("latin-1"), value.decode()) for name, value in raw]
    named = _named_hop_by_hop(value for name, value in pairs if name == "connection")
    dropped = HOP_BY_HOP | _REQUEST_ONLY | _ROUTING | named
    kept = CIMultiDict(pair for pair in pairs if pair[0] not in dropped)
    if inference and "accept-encoding" in kept:
        kept["accept-encoding"] = "identity"
    return kept


def headers_for_client(response: aiohttp.ClientResponse, url: str) -> Headers:
    """The worker's headers without those of its connection, and without its address.

    `url`: the worker's. A redirect to it is one to the proxy, whose client knows no worker.
    """
    dropped = HOP_BY_HOP | _named_hop_by_hop(response.headers.getall("Connection", ()))
    kept = []
    for name, value in response.raw_headers:
        lower = name.decode("latin-1").lower()
        if lower == "location" and (value + b"/").startswith(url.encode() + b"/"):
            kept.append((name, value.removeprefix(url.encode()) or b"/"))
        elif lower not in dropped:
            kept.append((name, value))
    return kept


def is_event_stream(response: aiohttp.ClientResponse) -> bool:
    kind = response.headers.get("Content-Type", "")
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def retry_after(response: aiohttp.ClientResponse) -> int | None:
    """Seconds. None if the worker names none, or names a date."""
    value = response.headers.get("Retry-After", "")
    return int(value) if value.isdecimal() and len(value) < 6 else None


def _named_hop_by_hop(values: Iterable[str]) -> frozenset[str]:
    return frozenset(name.strip().lower() for value in values for name in value.split(","))
