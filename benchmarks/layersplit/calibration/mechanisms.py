"""What may have made the gain, and the search for the numbers that make it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.layersplit.calibration.gain import Setting, Steady, play
from benchmarks.layersplit.calibration.workload import Sessions
from sglang_scaling_fixes.console import say

BUSY = (96, 160, 224)
"""Users at once, where the pool's hits are not all that the gain is made of: the GPUs are busy."""


@dataclass(frozen=True)
class Mechanism:
    """`fitted`: what was turned, for a reader. The candidates are the whole search."""

    name: str
    says: str
    fitted: str
    candidates: tuple[Setting, ...]


MECHANISMS = (
    Mechanism(
        "hits",
        "no host cache: what the small pool loses is computed again",
        "users at once",
        tuple(Setting(live, turns=20) for live in range(8, 41, 2)),
    ),
    Mechanism(
        "hits, speed too",
        "the same, on slower or faster GPUs",
        "users at once, TFLOP/s",
        tuple(
            Setting(live, turns=16, tflops=tflops)
            for tflops in (300.0, 1200.0)
            for live in range(12, 61, 8)
        ),
    ),
    Mechanism(
        "loads",
        "an endless host cache: what the small pool loses is loaded, by each rank for its layers",
        "users at once, GB/s from each rank's host",
        tuple(Setting(live, turns=8, load=1e9 * rate) for live in BUSY for rate in (3, 4, 5, 7)),
    ),
    Mechanism(
        "held",
        "every prefix is found by both; decode is slow to take KV, and floor(T / L) requests wait",
        "users at once, us of each prompt token",
        tuple(
            Setting(live, turns=8, hold=1e-6 * hold, found=True)
            for live in BUSY
            for hold in (20, 30, 40, 50)
        ),
    ),
)


@dataclass(frozen=True)
class Fit:
    """`gains`: by context. `error`: root of the mean square of ln(gain / published)."""

    mechanism: Mechanism
    setting: Setting
    gains: Mapping[int, float]
    error: float


def best(mechanism: Mechanism, sessions: Sessions, published: Mapping[int, float]) -> Fit:
    """The candidate with the least error."""
    fits = []
    for number, setting in enumerate(mechanism.candidates, 1):
        gains = {context: gain(sessions, context, setting) for context in published}
        fits.append(Fit(mechanism, setting, gains, error(gains, published)))
        say(
            f"{mechanism.name}: {number} of {len(mechanism.candidates)}, error {fits[-1].error:.3f}"
        )
    return min(fits, key=lambda fit: fit.error)


def error(gains: Mapping[int, float], published: Mapping[int, float]) -> float:
    squares = [math.log(gains[context] / published[context]) ** 2 for context in published]
    return math.sqrt(sum(squares) / len(squares))


def gain(sessions: Sessions, context: int, setting: Setting, first: int = 0) -> float:
    """Goodput of ours over no split's."""
    unsplit, ours = pair(sessions, context, setting, first)
    return ours.goodput / unsplit.goodput


def pair(
    sessions: Sessions, context: int, setting: Setting, first: int = 0
) -> tuple[Steady, Steady]:
    """No split, and ours, over the same requests."""
    trace = sessions.kept_up(context, setting.live, setting.turns, first)
    deployments = setting.deployments()
    return (
        play(trace, deployments["unsplit"], setting),
        play(trace, deployments["ours"], setting),
    )


def spread(
    sessions: Sessions, context: int, setting: Setting, starts: Sequence[int]
) -> tuple[float, float]:
    """Least and most gain, with users that begin with other sessions."""
    found = [gain(sessions, context, setting, first) for first in starts]
    return min(found), max(found)
