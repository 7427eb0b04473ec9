"""Seconds of one forward pass: compute, broadcasts that it waits for, loads that it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.traffic import Forward, Speed, layer_runs
from sglang_scaling_fixes.layersplit.simulator.deployment import Deployment


@dataclass(frozen=True)
class Rates:
    """Assumed. `load` and `transfer`: bytes/s from a rank's host, and of all ranks to decode.

    `hold`: seconds for which decode takes no KV of a request after it was sent, for each token of
    its prompt. `output_token`: seconds that decode needs for a token.
    """

    speed: Speed
    load: float
    transfer: float
    output_token: float
    hold: float = 0.0


@dataclass(frozen=True)
class Seconds:
    """Of a pass. `broadcast` and `load`: what of them no compute hides."""

    compute: float
    broadcast: float
    load: float

    @property
    def total(self) -> float:
        return self.compute + self.broadcast + self.load


def of_pass(
    batch: Sequence[Forward], loaded: int, pool: Pool, deployment: Deployment, rates: Rates
) -> Seconds:
    """`loaded`: tokens that each rank loads from its host for this pass, in its own layers.

    Loads go layer by layer beside the compute, as HiCache's do: what is longer is exposed.
    """
    compute = broadcast = 0.0
    for count, layer in layer_runs(batch, pool, rates.speed):
        compute += count * layer.compute
        if deployment.sends == "ours":
            broadcast += count * layer.ours.exposed
        elif deployment.sends == "upstream":
            broadcast += count * layer.upstream.exposed
    load = loaded * pool.row * deployment.kept_layers / rates.load
    return Seconds(compute, broadcast, max(load - compute, 0.0))


def sent_seconds(tokens: int, pool: Pool, rates: Rates) -> float:
    """Until decode has so many tokens of every layer, while it takes nothing else."""
    return tokens * pool.row * pool.unsplit_layers / rates.transfer
