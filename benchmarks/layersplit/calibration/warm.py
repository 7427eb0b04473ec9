"""What hits are worth to prefill alone: its compute with none, over that with nine tenths found."""

from __future__ import annotations

from benchmarks.layersplit.calibration.gain import BANDWIDTH, POOL
from sglang_scaling_fixes.layersplit.planner.traffic import Speed, forwards

HITS = 0.9


def over_cold(context: int) -> float:
    """The same for every speed of the GPUs: it is a ratio of FLOPs."""
    cold, warm = (
        sum(
            layer.compute
            for forward in forwards(context, hits, POOL.chunk)
            for layer in forward.layers(POOL, Speed(BANDWIDTH, 1e12))
        )
        for hits in (0.0, HITS)
    )
    return cold / warm
