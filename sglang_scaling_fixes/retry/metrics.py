"""What the retry proxy counts."""

from __future__ import annotations

from typing import Any

from sglang_scaling_fixes.metrics import PREFIX, SECONDS, Family, Metric, exported

RETRY_PROXY = Family(
    PREFIX + "retry_proxy_",
    "the proxy",
    (
        Metric(
            "requests",
            "counter",
            "Requests, by what became of them.",
            ("outcome",),
            series=(
                ("ok",),
                ("recovered",),
                ("rejected",),
                ("failed",),
                ("broken",),
                ("disconnected",),
                ("refused",),
            ),
        ),
        Metric(
            "retries", "counter", "Attempts that failed, and what followed.", ("reason", "outcome")
        ),
        Metric("anomalies", "counter", "Generations a worker's guard aborted.", ("worker",)),
        Metric(
            "false_alarms",
            "counter",
            "Anomalies that two workers found in a sound request, answered without their guards.",
        ),
        Metric(
            "migrations",
            "counter",
            "Streams that another worker went on with after their client had a byte.",
            ("reason",),
        ),
        Metric("retries_refused", "counter", "Retries that the retry budget had no room for."),
        Metric("worker_up", "gauge", "1 unless the worker is down.", ("worker",)),
        Metric("inflight", "gauge", "Requests in flight now."),
        Metric("held_bytes", "gauge", "Bytes of requests and responses held now."),
        Metric("stream_restarts", "counter", "Streams begun anew before their client had a byte."),
        Metric(
            "first_byte_seconds",
            "histogram",
            "From a request's last byte to the first of its answer, all attempts included.",
            buckets=SECONDS,
        ),
    ),
)


def retry_proxy(registry: Any) -> dict[str, Any]:
    """The proxy's own, by name, in a registry of its own: it is a process without SGLang."""
    return exported(RETRY_PROXY, registry=registry)
