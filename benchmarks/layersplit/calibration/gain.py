"""Goodput of a deployment under a workload that is kept up, and of one over another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.flags import size
from sglang_scaling_fixes.layersplit.planner.models import GLM_5_1
from sglang_scaling_fixes.layersplit.planner.traffic import Speed
from sglang_scaling_fixes.layersplit.scratch import CONTEXTS
from sglang_scaling_fixes.layersplit.simulator import deployment
from sglang_scaling_fixes.layersplit.simulator.cost import Rates
from sglang_scaling_fixes.layersplit.simulator.deployment import Deployment
from sglang_scaling_fixes.layersplit.simulator.engine import Outcome, Replay
from sglang_scaling_fixes.layersplit.simulator.records import Request

POOL = Pool(
    GLM_5_1, 8, "fp8", size("--mem", "26.22GiB"), "none", CONTEXTS * GLM_5_1.context, chunk=8192
)
"""The deployment whose capacities are published (#29930). Z.ai's own is not."""
BANDWIDTH, TRANSFER, OUTPUT_TOKEN = 300e9, 50e9, 0.02
"""Assumed, as `layersplit simulate` does: bytes/s of a broadcast and to decode, s of a token."""
ENDLESS_HOST = 1 << 60
"""Bytes: a host that forgets nothing."""
FROM, TO = 0.25, 0.75
"""The part of a replay that counts: all users are under way, and none has ended."""


@dataclass(frozen=True)
class Setting:
    """What a fit may turn. `live`: users at once. `turns`: requests of each.

    `load`: bytes/s from a rank's host; None: there is none. `hold`: seconds for each prompt token
    until decode takes its KV. `found`: every prefix is found, whatever the capacity.
    """

    live: int
    turns: int
    tflops: float = 600.0
    load: float | None = None
    hold: float = 0.0
    found: bool = False

    def rates(self) -> Rates:
        speed = Speed(BANDWIDTH, 1e12 * self.tflops)
        return Rates(speed, self.load or 1.0, TRANSFER, OUTPUT_TOKEN, self.hold)

    def deployments(self) -> dict[str, Deployment]:
        """By name, without the limit of what the model reads: contexts are scaled past it."""
        host = 0 if self.load is None else ENDLESS_HOST
        return {one.name: one for one in deployment.of(POOL, host)}


@dataclass(frozen=True)
class Steady:
    """Prompt tokens/s, and shares of them, while all is under way."""

    goodput: float
    hits: float
    loaded: float
    prompt: float
    """Tokens on average."""
    held: int
    """Most requests that held KV at once, in the whole replay."""


def play(trace: Sequence[Request], one: Deployment, setting: Setting) -> Steady:
    return steady(Replay(trace, POOL, one, setting.rates(), endless=setting.found).run())


def steady(outcome: Outcome) -> Steady:
    low, high = FROM * outcome.ended, TO * outcome.ended
    counted = [one for one in outcome.answers if low < one.ended <= high]
    tokens = sum(one.request.prompt for one in counted)
    return Steady(
        tokens / (high - low),
        sum(one.hit for one in counted) / tokens,
        sum(one.loaded for one in counted) / tokens,
        tokens / len(counted),
        outcome.most_held,
    )
