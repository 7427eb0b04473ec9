"""What others printed. None of it was measured here."""

from __future__ import annotations

from dataclasses import dataclass

GAIN = {40_000: 1.10, 120_000: 2.32}
"""Throughput with LayerSplit over without, by tokens of a request, at 90% hits: the two ends that
Z.ai's text on GLM-5's serving gives. What lies between is not published, nor are the machines, the
load, or the host's cache."""


@dataclass(frozen=True)
class Rounds:
    """sgl-project/sglang #29930 (closed unmerged): GLM-5.2, 8 ranks, a conversation of 3 rounds."""

    hits_unsplit: tuple[float, ...] = (0.0, 0.20, 0.15)
    hits_split: tuple[float, ...] = (0.0, 0.50, 0.67)
    ttft_unsplit: float = 57.5
    """Seconds, of the round with the longest, the last. Whether a mean or the worst is not said."""
    ttft_split: float = 32.5
    prefill_tokens_s: float = 11_632.0
    """Prompt tokens/s without a split and without hits; about the same with one."""


ROUNDS = Rounds()
PEGAFLOW = 1.73
"""Throughput warm over cold: novitalabs/pegaflow, GLM-5.1-FP8 on 8 H200, an external cache of KV.
It compares hits with none, not a split with no split."""
