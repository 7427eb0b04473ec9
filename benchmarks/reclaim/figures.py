"""Medians, ratios and percentiles of what the runs gave."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def compare(runs: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Stock and fixed figures of alternating runs: medians, their ratio, and pair by pair.

    `runs` is in the order of running; each two in a row are one stock and one fixed run.
    """
    halves = {half: [v for h, v in runs if h == half] for half in ("stock", "fixed")}
    pairs = [dict(runs[i : i + 2]) for i in range(0, len(runs) - 1, 2)]
    ratios = [pair["fixed"] / pair["stock"] for pair in pairs]
    medians = {half: statistics.median(values) for half, values in halves.items()}
    return {
        "median": {half: round(value, 3) for half, value in medians.items()},
        "ratio_of_medians": round(medians["fixed"] / medians["stock"], 4),
        "ratio_per_pair": [round(ratio, 4) for ratio in ratios],
        "pairs": spread(ratios),
    }
