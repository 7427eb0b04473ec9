"""What each figure of a plan is, and by which formula; what others published; what is left out.

A kind is `measured`, `published` or `modelled`. None here is measured: a plan runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.flags import size
from sglang_scaling_fixes.layersplit.planner.models import GLM_5_1, PAGE

FORMULAS = {
    "capacity_tokens.unsplit": f"B / ((L + D) * b), down to pages of {PAGE}",
    "capacity_tokens.upstream": f"B / ((ceil(L / P) + 1 + D) * b), down to pages of {PAGE}",
    "capacity_tokens.ours": (
        f"(B - scratch.bytes) / (O * b), down to pages of {PAGE}; O = ceil(L / P) + D, with a "
        "split draft layer ceil((L + 1) / P)"
    ),
    "scratch.rows": (
        f"S, up to pages of {PAGE}: page 0 (reserved), the batch's prefixes, its new tokens"
    ),
    "scratch.bytes": "2 * scratch.rows * b",
    "rows.context": "as given",
    "rows.prefix_tokens": "X = context * hit rate, at most context - 1",
    "rows.forwards": "ceil((context - X) / C)",
    "rows.bytes_per_forward.upstream": "capacity_tokens.upstream * b * L, of each forward",
    "rows.bytes_per_forward.ours": (
        f"{PAGE} * ceil(X / {PAGE}) * b * (L, or L + 1 with a split draft layer), of the first "
        "forward; each later one has the chunks before it in X"
    ),
    "rows.compute_ms": "FLOPs of every layer and forward / (P * FLOP/s)",
    "rows.exposed_ms.upstream": (
        "sum over layers and forwards of t(index) + max(0, t(KV) - hidden share of compute); of "
        "layer 0 all of it"
    ),
    "rows.exposed_ms.ours": (
        "sum over layers and forwards of max(0, t(KV + index) - compute of the layer before); of "
        "layer 0 all of it"
    ),
    "rows.contexts_held": "floor(capacity / context)",
    "rows.gain.over_unsplit.contexts_held": "contexts_held.ours / contexts_held.unsplit",
    "rows.gain.over_unsplit.request_speed": "compute / (compute + exposed.ours)",
    "rows.gain.over_upstream.contexts_held": "contexts_held.ours / contexts_held.upstream",
    "rows.gain.over_upstream.request_speed": (
        "(compute + exposed.upstream) / (compute + exposed.ours)"
    ),
    "rows.layers": (
        "of the first forward, each run of layers with the same figures once; compute: FLOPs / "
        "(P * FLOP/s); exposed as in exposed_ms; hidden = t - exposed"
    ),
}
"""By the figure's path in the JSON; a path stands for all below it, too."""

SYMBOLS = {
    "B": "bytes for KV and index-K on each rank (--mem)",
    "L": "layers of the model without the draft layer",
    "P": "ranks (--cp)",
    "b": "bytes of one token's KV and index-K in one layer",
    "D": (
        "1 if each rank keeps the draft layer whole, else 0; with --mtp split 1 for the other pools"
    ),
    "S": "tokens of one scratch (--scratch-tokens)",
    "C": "new tokens of a forward (--chunked-prefill-size)",
    "t": "bytes / bandwidth (--bandwidth-gb-s)",
}

LEFT_OUT = (
    "what more contexts in the pool are worth as hits: all three pools have the same hit rate",
    "requests that share a prefix: each counts its context whole",
    "waiting, batching, kernels below the assumed FLOP/s, CP's and the experts' own communication",
    "loads from HiCache, the transfer to decode",
    "upstream's copy of each owned layer into its scratch (in upstream's favour)",
)


@dataclass(frozen=True)
class Published:
    """A capacity in tokens that others printed; `figure` is one of `capacity_tokens`."""

    figure: str
    tokens: int


PUBLISHED_BY = (
    "sgl-project/sglang #29930: the pool of a pull request that was closed unmerged; its model is "
    "GLM-5.2, counted with index-K on all layers as GLM-5.1 has it"
)
PUBLISHED_FLAGS = "--cp 8 --kv-dtype fp8 --mem 26.22GiB --mtp none"
PUBLISHED_POOL = Pool(
    GLM_5_1, 8, "fp8", size("--mem", "26.22GiB"), "none", GLM_5_1.context, chunk=PAGE
)
"""As those flags say; neither pool has a compact scratch, so its last two fields do not count."""
PUBLISHED = (Published("unsplit", 457_920), Published("upstream", 3_247_296))


def published() -> list[dict[str, Any]]:
    """Each published figure beside the planner's own for the same deployment."""
    modelled = {"unsplit": PUBLISHED_POOL.unsplit(), "upstream": PUBLISHED_POOL.upstream()}
    return [
        {
            "figure": f"capacity_tokens.{one.figure}",
            "kind": "published",
            "tokens": one.tokens,
            "by": PUBLISHED_BY,
            "flags": PUBLISHED_FLAGS,
            "modelled_tokens": modelled[one.figure],
            "modelled_over_published": round(modelled[one.figure] / one.tokens, 5),
        }
        for one in PUBLISHED
    ]
