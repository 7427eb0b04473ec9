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
        "Seconds before an unanswered ABORT is sent again (doubles up to 5 s).",
    ),
    Setting(
        "--safe-reclaim-max-held",
        "max_held",
        "Share of the KV pool that may be held for more than 5 s without proof. Past it decode "
        "answers new requests with 503 and Retry-After, and fences its memory if a prefill that "
        "could still write is gone, or --safe-reclaim-fence is given. 1: no limit.",
        low=0.001,
        high=1.0,
        unit="share of the pool",
    ),
    Setting(
        "--safe-reclaim-fence",
        "fence",
        "Past --safe-reclaim-max-held, fence whoever is to blame: decode replaces its receiving "
        "Mooncake engine, so that nothing sent before can land. Costs about a second and every "
        "transfer in flight to this decode.",
    ),
)
