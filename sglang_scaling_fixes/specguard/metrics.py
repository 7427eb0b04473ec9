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
                for action in ("observed", "aborted", "false_alarm")
            ),
        ),
        Metric(
            "detection_tokens", "histogram", "Tokens generated until an anomaly.", buckets=_TOKENS
        ),
        Metric("moved_requests", "counter", "Requests kept from reading suspect cached KV."),
        Metric(
            "accusations",
            "counter",
            "What an anomaly made suspect: a prompt's beginning, its whole path, nothing new, "
            "nothing because of the limit, nothing because nobody shares it.",
            ("outcome",),
            series=tuple(
                (outcome,) for outcome in ("namespace", "path", "covered", "limited", "unshared")
            ),
        ),
        Metric("suspicions", "gauge", "Beginnings and prompts that are suspect now."),
        Metric(
            "suspicions_ended",
            "counter",
            "Suspicions that are over: withdrawn, after their life, or for want of room.",
            ("reason",),
            series=(("false_alarm",), ("expired",), ("dropped",)),
        ),
        Metric(
            "accept_length",
            "gauge",
            "Of all requests: recent, and the highest that recent has been since the start.",
            ("of",),
        ),
        Metric(
            "accept_length_declines",
            "counter",
            "Times that the recent accept length fell below three quarters of the highest.",
        ),
        Metric(
            "notifications_received",
            "counter",
            "Notifications from decode servers: taken, of a room that is not known to this "
            "scheduler, or not signed.",
            ("outcome",),
            series=(("taken",), ("unknown",), ("refused",)),
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
