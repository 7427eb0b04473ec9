"""How many tokens the split pool may have: stock's own calculation, with what ours really takes.

    tokens = (bytes for KV - 2 scratches) / (owned layers x (KV + index keys) + draft's layers)

Stock adds a layer for its one scratch of the pool's size. Ours are compact, so that layer is taken
away again, and the two scratches are taken off the bytes. Some releases count too little: 0.5.16
takes 576 bytes for packed fp8 where the pool has 656, and 0.5.16 and 0.5.17 take the draft's layer,
which every rank keeps whole, for a share of the split. So a token never counts for less than is
allocated for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import wrap
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit import points, scratch
from sglang_scaling_fixes.layersplit.schedule import SCRATCHES
from sglang_scaling_fixes.resolved_args import resolved

INDEX_BYTES = 132
"""Of a token's index key: 128 values of one byte and a scale of four (`DSATokenToKVPool`)."""
FLAG = "--layer-split-scratch-tokens"

_BYTES = "sglang_scaling_fixes_scratch_bytes"
"""Attribute of stock's configurator of a split pool."""


def attach(scratch_tokens: int) -> None:
    """`scratch_tokens`: tokens of a scratch; 0 for the default."""

    def init(stock: Callable[..., None], sizes: Any, kvc: Any, *args: Any, **kwargs: Any) -> None:
        stock(sizes, kvc, *args, **kwargs)
        ranks = _ranks(kvc)
        if ranks == 1:
            return
        from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool

        shape = of_server(kvc, scratch_tokens)
        LayerSplitDSATokenToKVPool.scratch_size = shape
        row = kv_bytes(kvc) + INDEX_BYTES
        setattr(sizes, _BYTES, SCRATCHES * shape.pages * _page_size(kvc) * row)
        if not _skips_index():
            layers = owned(kvc.layer_info.num_effective_layers, ranks) + _draft_layers(kvc)
            sizes._cell_size = max(sizes._cell_size, layers * row)

    def pool_sizes(
        stock: Callable[..., Any], sizes: Any, available_bytes: int, page_size: int
    ) -> Any:
        taken: int = getattr(sizes, _BYTES, 0)
        if taken and available_bytes <= taken:
            raise ConfigError(
                f"{FLAG}: two scratches take {taken / 2**30:.2f} GiB of the"
                f" {available_bytes / 2**30:.2f} GiB that are left for KV; lower it, or raise"
                " --mem-fraction-static"
            )
        return stock(sizes, available_bytes - taken, page_size)

    def owned_layers(stock: Callable[..., Any], runner: Any, num_layers: int) -> int:
        ranks = _ranks(runner)
        return stock(runner, num_layers) if ranks == 1 else owned(num_layers, ranks)

    wrap(points.CELL_SIZE, init)
    wrap(points.POOL_SIZES, pool_sizes)
    wrap(points.OWNED_LAYERS, owned_layers)


def owned(layers: int, ranks: int) -> int:
    """Layers of the rank that has most."""
    return -(-layers // ranks)


def of_server(kvc: Any, scratch_tokens: int) -> scratch.Size:
    """The scratch of a server; `ConfigError` if it does not hold one context."""
    context, page_size = kvc.model_config.context_len, _page_size(kvc)
    chunk = resolved(kvc.server_args, "chunked_prefill_size")
    if not chunk or chunk < 0:
        raise ConfigError(
            f"--chunked-prefill-size {chunk}: a scratch holds one chunk, so it needs an end; set it"
            " to a number of tokens, or start without layer-split"
        )
    requests = resolved(kvc.server_args, "max_running_requests") or scratch.REQUESTS
    least = scratch.least(context, chunk, requests, page_size)
    tokens = scratch_tokens or max(least, scratch.CONTEXTS * context)
    if tokens < least:
        raise ConfigError(
            f"{FLAG} {tokens}: a request can have a prefix of {context} tokens (the context length)"
            f" beside a chunk of {chunk}, and would never fit; set it to {least} or more, or lower"
            " --context-length"
        )
    return scratch.size(tokens, chunk, requests, page_size)


def kv_bytes(kvc: Any) -> int:
    """Bytes of a token's KV in one layer, as the pool allocates them."""
    from sglang.srt.mem_cache.kv_cache_configurator import calculate_mla_kv_cache_dim

    arguments = {
        "model_config": kvc.model_config,
        "kv_cache_dtype": kvc.kv_cache_dtype,
        "server_args": kvc.server_args,
    }
    known = inspect.signature(calculate_mla_kv_cache_dim).parameters
    dim: int = calculate_mla_kv_cache_dim(**{k: v for k, v in arguments.items() if k in known})
    return dim * int(kvc.kv_cache_dtype.itemsize)


def _draft_layers(kvc: Any) -> int:
    """Layers of the draft, which every rank keeps whole."""
    if kvc.is_draft_worker or not kvc.spec_algorithm.is_eagle():
        return 0
    return int(kvc.spec_aux_config.eagle_draft_num_layers or 0)


def _skips_index() -> bool:
    """Whether this release gives no index keys to layers that take another one's top-k. It then
    counts them itself."""
    from sglang.srt.mem_cache import kv_cache_configurator

    elides = getattr(kv_cache_configurator, "_should_elide_dsa_index_k", None)
    return elides is not None and bool(elides(is_draft_worker=False))


def _page_size(kvc: Any) -> int:
    return int(getattr(kvc, "pool_page_size", None) or kvc.page_size)


def _ranks(kvc: Any) -> int:
    """Ranks over which this pool is split; 1 if it is not."""
    from sglang.srt.layers.cp.utils import get_glm_dsa_cp_layer_shard_info

    ranks: int = get_glm_dsa_cp_layer_shard_info(kvc)[1]
    return ranks
