"""What the replay needs to know of a pool: how much it holds, sends and loads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sglang_scaling_fixes.layersplit import scratch
from sglang_scaling_fixes.layersplit.planner.capacity import Pool, owned_layers
from sglang_scaling_fixes.layersplit.planner.models import PAGE

NAMES = ("unsplit", "upstream", "ours")


@dataclass(frozen=True)
class Deployment:
    """`sends`: whose broadcasts it has, one of `NAMES`.

    `cached`: tokens that the pool keeps. `running`: tokens that its running requests may hold
    together; the same number, unless an ablation takes them apart.

    `scratch`: tokens of a batch's prefixes, in whole pages; None: no limit. `kept_layers`: layers
    of the fullest rank, which it loads of a prefix from its host. `host`: tokens that a rank's
    host memory keeps of these. `longest`: tokens of a prompt that the server reads.
    """

    name: str
    sends: str
    cached: int
    running: int
    scratch: int | None
    kept_layers: int
    host: int
    longest: float = math.inf

    def but(self, **changed: object) -> Deployment:
        """The same with other fields."""
        return replace(self, **changed)  # type: ignore[arg-type]


def of(pool: Pool, host_bytes: int) -> tuple[Deployment, ...]:
    """One for each of `NAMES`. `host_bytes`: HiCache's memory of each rank, 0 for none.

    A rank's host memory keeps the layers that the rank owns, and its draft layer (stock's host
    pool has ceil(L / P) of them under a split).
    """
    fullest = max(owned_layers(pool.model.layers, pool.ranks)) + pool.draft_layers
    prefix = scratch.size(pool.scratch_tokens, pool.chunk, scratch.REQUESTS, PAGE).prefix * PAGE
    parts = (
        ("unsplit", pool.unsplit(), None, pool.unsplit_layers),
        ("upstream", pool.upstream(), None, fullest),
        ("ours", pool.ours(), prefix, pool.our_layers),
    )
    return tuple(
        Deployment(
            name=name,
            sends=name,
            cached=tokens,
            running=tokens,
            scratch=limit,
            kept_layers=layers,
            host=host_bytes // (PAGE * layers * pool.row) * PAGE,
        )
        for name, tokens, limit, layers in parts
    )
