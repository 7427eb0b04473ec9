"""`Retry-After` on the refusals of a decode that holds too much."""

from __future__ import annotations

from sglang_scaling_fixes.reclaim.rules.quarantine import RETRY_AFTER_S
from sglang_scaling_fixes.refusals import Headers

REFUSAL = "safe-reclaim: this decode holds too many KV slots that a prefill may still write"
"""How the message of every such refusal begins."""


def edit(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
    """When to come back, if this is our refusal."""
    if REFUSAL.encode() in body:
        headers = [*headers, (b"retry-after", str(RETRY_AFTER_S).encode())]
    return headers, body
