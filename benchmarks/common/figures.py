"""Medians, percentiles and ratios of what the runs gave."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence


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


def ratio(upper: Sequence[float], lower: Sequence[float], samples: int = 4000) -> dict[str, float]:
    """Ratio of the means of paired values, with its 95% interval.

    The interval is the bootstrap's: the ratio of as many pairs drawn with replacement,
    `samples` times. Pairs share what befell both, so they are drawn together.
    """
    pairs = list(zip(upper, lower, strict=True))
    draw = random.Random(1)
    drawn = sorted(_ratio(draw.choices(pairs, k=len(pairs))) for _ in range(samples))
    return {
        "value": round(_ratio(pairs), 4),
        "from": round(drawn[round(0.025 * samples)], 4),
        "to": round(drawn[round(0.975 * samples) - 1], 4),
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(upper for upper, _ in pairs) / sum(lower for _, lower in pairs)
