"""What the split pool of this process has counted."""

from __future__ import annotations

import sys
from typing import Any

_POOL = "sglang_scaling_fixes.layersplit.pool"


def pool() -> Any:
    """The split pool of this process; None where none was built."""
    module = sys.modules.get(_POOL)  # importing it would import SGLang
    current = module and module.LayerSplitDSATokenToKVPool.current
    return current and current()


def report() -> dict[str, Any] | None:
    """Counts, layers and sizes of this rank, for `/server_info`."""
    split = pool()
    if split is None:
        return None
    start, end = split._owned_local_layer_range()
    return {
        **split.stats.report(),
        "exposed_ms": round(split.lane.exposed_ms(), 3),
        "owned_layers": [start, end],
        "tokens": split.size,
        "scratch_capacity": split.size_of_scratch.pages,
        "scratch_bytes": sum(scratch.nbytes for scratch in split.scratches),
    }
