"""What LayerSplit counts, on each rank of a prefill."""

from __future__ import annotations

from sglang_scaling_fixes.metrics import PREFIX, Family, Metric

PREFILL = Family(
    PREFIX + "layer_split_",
    "prefill",
    (
        Metric("forwards", "counter", "Forward passes over the split pool."),
        Metric("broadcasts", "counter", "Broadcasts: KV and index keys of a layer are one."),
        Metric("bytes", "counter", "Bytes that they carried, from this rank or to it."),
        Metric("pages", "counter", "Prefix pages of all passes; each travels once for a layer."),
        Metric("host_waits", "counter", "Passes for which the host asked a device what is shared."),
        Metric("exposed_ms", "counter", "Milliseconds for which a forward pass waited for them."),
        Metric("scratch_pages", "gauge", "Pages of a scratch that the newest pass uses."),
        Metric("scratch_capacity", "gauge", "Pages of a scratch."),
        Metric("deferred", "counter", "Batches closed before a request that would not fit."),
    ),
)
