"""What safe reclaim counts, on decode and on prefill."""

from __future__ import annotations

from sglang_scaling_fixes.metrics import PREFIX, SECONDS, Family, Metric

_PREFIX = PREFIX + "reclaim_"

DECODE = Family(
    _PREFIX,
    "decode",
    (
        Metric("exposures", "counter", "Transfers whose destinations were sent."),
        Metric("landed", "counter", "Transfers that ended well."),
        Metric("gave_up", "counter", "Transfers whose owner gave up: slots withheld."),
        Metric("returned", "counter", "Holds that ended with proof."),
        Metric("frees", "counter", "Writers proven harmless, by kind of proof.", ("proof",)),
        Metric("held_tokens", "gauge", "KV token slots withheld now."),
        Metric("holds", "gauge", "Holds now, by what they wait for.", ("reason",)),
        Metric(
            "hold_seconds", "histogram", "From giving up to proof on all TP ranks.", buckets=SECONDS
        ),
        Metric(
            "ack_seconds",
            "histogram",
            "From giving up to a prefill rank's proof.",
            buckets=SECONDS,
        ),
        Metric("aborts_sent", "counter", "Aborts sent to prefill ranks."),
        Metric("aborts_resent", "counter", "Of them, repetitions: no acknowledgement had come."),
        Metric("refusals", "counter", "Requests refused, by reason.", ("reason",)),
        Metric("fences", "counter", "Fences: receiving engines replaced."),
        Metric(
            "stale",
            "counter",
            "Acknowledgements and successes that came late, twice, or for nobody.",
        ),
        Metric("endings", "counter", "Transfers ended at once: prefill had ended the request."),
        Metric("garbage", "counter", "Unreadable control messages, dropped."),
    ),
)

PREFILL = Family(
    _PREFIX,
    "prefill",
    (
        Metric("bound", "counter", "Destinations received with a lease."),
        Metric("aborts_received", "counter", "Aborts received."),
        Metric("refusals_received", "counter", "Requests that decode did not take."),
        Metric("abort_acks", "counter", "Acknowledgements of aborts, by verdict.", ("verdict",)),
        Metric(
            "endings_told", "counter", "Endings told to decode unasked, by verdict.", ("verdict",)
        ),
        Metric("poisoned_rooms", "counter", "Attempts with a write of unknown end."),
        Metric(
            "short_sends",
            "counter",
            "Successes that did not cover all that decode exposed, sent on as failures.",
        ),
        Metric(
            "refused", "counter", "Destinations dropped: too many wait for rooms that are in use."
        ),
        Metric("failed_writes", "counter", "Writes that reported failure."),
        Metric("chunks_dropped", "counter", "Chunks of ended attempts, not written."),
        Metric("garbage", "counter", "Unreadable control messages, dropped."),
    ),
)
