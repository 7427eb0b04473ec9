"""`Retry-After` on the refusals of a decode, and in one word what it refuses or why it failed."""

from __future__ import annotations

from sglang_scaling_fixes.reclaim.rules.quarantine import RETRY_AFTER_S
from sglang_scaling_fixes.refusals import Headers

REFUSAL = "safe-reclaim: this decode holds too many KV slots that a prefill may still write"
"""How the message begins when every request is refused."""
AILING = "safe-reclaim: this decode takes no requests of prefill"
"""The same when those of one prefill instance are; its address and the reason follow."""
TAKEN = "safe-reclaim: another request at this decode waits for the KV of the same bootstrap room"
"""The same when two requests name one room."""
ENDED = "safe-reclaim: prefill ended this request"
"""The same of a request that was taken, and ended on prefill first."""
REASON_HEADER = b"x-sglang-scaling-fixes-reason"
REASONS = {
    AILING: (b"prefill-ailing", RETRY_AFTER_S),
    REFUSAL: (b"decode-full-of-held-kv", RETRY_AFTER_S),
    TAKEN: (b"room-taken", RETRY_AFTER_S),
    ENDED: (b"prefill-ended", 1),  # this decode is well
}
"""Text -> the reason in one word, and the seconds to wait."""


def edit(headers: Headers, body: bytes) -> tuple[Headers, bytes]:
    """When to come back and why not now, if this is one of ours."""
    for text, (reason, seconds) in REASONS.items():
        if text.encode() in body:
            after = str(seconds).encode()
            return [*headers, (b"retry-after", after), (REASON_HEADER, reason)], body
    return headers, body
