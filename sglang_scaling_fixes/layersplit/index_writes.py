"""New index keys, stored by stock's own kernels: once for the scratch, once for the owner's layer.

Stock's indexer takes a buffer from the pool and writes to it, in one of several ways that depend
on the machine. So its whole store is run for each place, with the slots of that place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import replace
from sglang_scaling_fixes.layersplit import points


def attach() -> None:
    for point in (points.STORE_INDEX, points.FUSED_STORE_INDEX):
        replace(point, everywhere)


def everywhere(stock: Callable[..., None]) -> Callable[..., None]:
    from sglang.srt.layers.attention.dsa import dsa_indexer

    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool

    def store(indexer: Any, *args: Any, **kwargs: Any) -> None:
        pool = dsa_indexer.get_token_to_kv_pool()
        if not isinstance(pool, LayerSplitDSATokenToKVPool) or pool.writing:
            stock(indexer, *args, **kwargs)
            return
        call = bound(*args, **kwargs)
        loc = call["out_cache_loc"]
        if loc is None:
            loc = call["forward_batch"].out_cache_loc
        for where, slots in pool.index_writes(call["layer_id"], loc):
            with where:
                stock(indexer, **{**call, "out_cache_loc": slots})

    signature = inspect.signature(stock)

    def bound(*args: Any, **kwargs: Any) -> dict[str, Any]:
        call = signature.bind(None, *args, **kwargs)
        call.apply_defaults()
        named = dict(call.arguments)
        named.pop("self")
        return named

    return store
