"""The split pool in stock's place, and all that stock does with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sglang_scaling_fixes.attach import unwrap_class
from sglang_scaling_fixes.layersplit import (
    admission,
    index_writes,
    metadata,
    points,
    sharing,
    sizing,
)

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


def attach(config: Config) -> None:
    """Stock imports the class from this module where it builds the pool, so it takes ours."""
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool

    # What hicache-ordering put on stock's class orders nothing any more: ours waits by itself. Left
    # there, it would look as if somebody else had hooked the name that is now our class's.
    unwrap_class(f"{points.MODULE}:LayerSplitDSATokenToKVPool")
    module = importlib.import_module(points.MODULE)
    module.LayerSplitDSATokenToKVPool = LayerSplitDSATokenToKVPool  # type: ignore[attr-defined]
    sizing.attach(config.layer_split_scratch)
    index_writes.attach()
    admission.attach()
    sharing.attach()
    metadata.attach()


def in_place() -> bool:
    """Whether stock would build our pool now."""
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool

    module = importlib.import_module(points.MODULE)
    return module.LayerSplitDSATokenToKVPool is LayerSplitDSATokenToKVPool
