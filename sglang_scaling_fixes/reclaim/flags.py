"""The settings of safe reclaim."""

from __future__ import annotations

from sglang_scaling_fixes.config import Setting

SETTINGS = (
    Setting(
        "--safe-reclaim-peer",
        "peer",
        "What decode does with a prefill that runs without safe-reclaim. hold: serve, and "
        "after an abort hold the KV slots until stock's success message proves the write "
        "landed. require: fail the request before any address is sent. stock-ack: like hold, "
        "and believe stock's own acknowledgement that the room has drained (0.5.19 and later).",
        choices=("hold", "require", "stock-ack"),
    ),
    Setting(
        "--safe-reclaim-audit",
        "audit",
        "Check every free on the decode side against all slots a prefill may still write. "
        "Costs a device sync per free; for tests and investigations.",
    ),
    Setting(
        "--safe-reclaim-resend",
        "resend",
        "Seconds before an unanswered ABORT is sent again (doubles up to 2 s).",
    ),
    Setting(
        "--safe-reclaim-max-held",
        "max_held",
        "Share of the KV pool that may be held for prefills that are ailing: gone, silent for "
        "5 s, or with a failed write. Up to it only requests that name such a prefill are answered "
        "with 503 and Retry-After; past it every new request is. 1: no limit.",
        low=0.001,
        high=1.0,
        unit="share of the pool",
    ),
    Setting(
        "--safe-reclaim-fence",
        "fence",
        "When decode makes its memory unreachable for what it sent before: a second Mooncake "
        "engine takes over, and the first is closed. auto: for a hold that nothing else can end "
        "(a failed write, a prefill that is gone), once the transfers under way have landed. "
        "always: also for a prefill that does not answer, and without waiting for its transfers. "
        "off: never; such holds last until decode restarts.",
        choices=("auto", "always", "off"),
    ),
)
