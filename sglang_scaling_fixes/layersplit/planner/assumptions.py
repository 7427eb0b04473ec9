"""Where each input of a plan comes from: given, published or assumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.traffic import Speed

Assumed = tuple[str, object, str, str]
"""Kind, value, unit, origin."""


def of(pool: Pool, speed: Speed) -> dict[str, Assumed]:
    """Of the deployment, and of how fast it is."""
    hides = "--upstream-hides"
    if speed.upstream_hides is None:
        hides += " not given: by FLOPs, the MLP before and the layer's own projections and indexer"
    memory, layer = "bytes for KV and index-K on each rank", "bytes of a token and layer"
    return {
        "model": ("given", pool.model.name, "", "--model"),
        "layers": ("published", pool.model.layers, "layers", pool.model.source),
        "ranks": ("given", pool.ranks, "GPUs", "--cp"),
        "memory": ("given", pool.memory, memory, "--mem"),
        "kv_bytes": ("published", pool.kv, layer, f"--kv-dtype {pool.dtype}"),
        "index_bytes": ("published", pool.index, layer, "fp8 and its scales"),
        "mtp": ("given", pool.mtp, "", "--mtp"),
        "scratch_tokens": (
            "given",
            pool.scratch_tokens,
            "tokens of one scratch",
            "--scratch-tokens",
        ),
        "chunk": ("given", pool.chunk, "new tokens of a forward", "--chunked-prefill-size"),
        "bandwidth_gb_s": ("assumed", speed.bandwidth / 1e9, "GB/s", "--bandwidth-gb-s"),
        "tflops": ("assumed", speed.flops / 1e12, "TFLOP/s of each GPU, as worked", "--tflops"),
        "upstream_hides": ("assumed", speed.upstream_hides, "of a layer's compute", hides),
    }


def as_json(found: Mapping[str, Assumed]) -> dict[str, dict[str, Any]]:
    """Each with the names of its fields."""
    fields = ("kind", "value", "unit", "from")
    return {name: dict(zip(fields, one, strict=True)) for name, one in found.items()}
