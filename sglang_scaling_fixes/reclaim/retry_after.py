"""`Retry-After` on the refusals of a decode, and in one word what it refuses."""

from __future__ import annotations

from sglang_scaling_fixes.reclaim.rules.quarantine import RETRY_AFTER_S
from sglang_scaling_fixes.refusals import Headers

REFUSAL = "safe-reclaim: this decode holds too many KV slots that a prefill may still write"
"""How the message begins when every request is refused."""
AILING = "safe-reclaim: this decode takes no requests of prefill"
"""The same when those of one prefill instance are; its address and the reason follow."""
TAKEN = "safe-reclaim: another request at this decode waits for the KV of the same bootstrap room"
"""The same when two requests name one room."""
REASON_HEADER = b"x-sglang-scaling-fixes-reason"
REASONS = {
    AILING: b"prefill-ailing",
    REFUSAL: b"decode-full-of-held-kv",
    TAKEN: b"room-taken",
}


def edit(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
    """When to come back and why not now, if this is our refusal."""
    for text, reason in REASONS.items():
        if text.encode() in body:
            after = str(RETRY_AFTER_S).encode()
            return [*headers, (b"retry-after", after), (REASON_HEADER, reason)], body
    return headers, body
