"""What the anomaly guard counts."""

from __future__ import annotations

from sglang_scaling_fixes.metrics import PREFIX, Family, Metric

_TOKENS = (128, 160, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

SPEC_GUARD = Family(
    PREFIX + "spec_guard_",
    "the scheduler",
    (
        Metric("requests", "counter", "Requests watched: those that verified drafts."),
        Metric(
            "anomalies",
            "counter",
            "Requests whose acceptance betrays a corrupted KV cache.",
            ("kind", "action"),
            series=tuple(
                (kind, action)
                for kind in ("low_accept_length", "high_accept_rate")
                for action in ("observed", "aborted")
            ),
        ),
        Metric(
            "detection_tokens", "histogram", "Tokens generated until an anomaly.", buckets=_TOKENS
        ),
        Metric("moved_requests", "counter", "Requests kept from reading suspect cached KV."),
        Metric(
            "notifications_received", "counter", "Notifications of anomalies from decode servers."
        ),
        Metric(
            "notifications",
            "counter",
            "Notifications of anomalies that decode sent to prefill servers.",
            ("outcome",),
            series=(("delivered",), ("failed",), ("lost",)),
        ),
    ),
)
