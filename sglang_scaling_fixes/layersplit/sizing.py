"""How many tokens the split pool may have: stock's own calculation, with what ours really takes.

    tokens = (bytes for KV - 2 scratches) / (owned layers x (KV + index keys) + draft's layers)

Stock adds a layer for its one scratch of the pool's size. Ours are compact, so the two of them are
taken off the bytes. No release counts a token of ours right, so it is counted here, for the rank
that takes most, as the pool allocates it:

    0.5.16             576 bytes for packed fp8, where the pool has 656: too little
    0.5.16, 0.5.17     the draft's layer, whole on every rank, as a share of the split: too little
    0.5.18 to 0.5.21   index keys of all layers on each rank: too much
    from 0.5.22        index keys of stock's scratch: too much
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
        token = token_bytes(kvc, ranks)
        # Of a draft that is no EAGLE only stock knows the size.
        known = kvc.spec_algorithm.is_none() or kvc.spec_algorithm.is_eagle()
        sizes._cell_size = token if known else max(sizes._cell_size, token)

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


def token_bytes(kvc: Any, ranks: int) -> int:
    """Bytes of a token in all layers of the rank that takes most, and in its draft's."""
    from sglang.srt.layers.cp.utils import get_layer_shard_range

    kv, indexed = kv_bytes(kvc), _indexed(kvc)
    ranges = (get_layer_shard_range(rank, ranks, len(indexed)) for rank in range(ranks))
    own: int = max(
        kv * (end - start) + INDEX_BYTES * sum(indexed[start:end]) for start, end in ranges
    )
    return own + _draft_layers(kvc) * (kv + INDEX_BYTES)


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


def _indexed(kvc: Any) -> list[bool]:
    """Which layers keep index keys, by the rule with which this release builds its pool."""
    from sglang.srt.mem_cache import kv_cache_configurator

    layers = range(kvc.layer_info.start_layer, kvc.layer_info.end_layer)
    elides = getattr(kv_cache_configurator, "_should_elide_dsa_index_k", None)
    if elides is None or not elides(is_draft_worker=kvc.is_draft_worker):
        return [True] * len(layers)
    from sglang.srt.configs.model_config import dsa_layer_skips_topk

    config = kvc.model_config.hf_config
    return [not dsa_layer_skips_topk(config, layer) for layer in layers]


def _page_size(kvc: Any) -> int:
    return int(getattr(kvc, "pool_page_size", None) or kvc.page_size)


def _ranks(kvc: Any) -> int:
    """Ranks over which this pool is split; 1 if it is not."""
    from sglang.srt.layers.cp.utils import get_glm_dsa_cp_layer_shard_info

    ranks: int = get_glm_dsa_cp_layer_shard_info(kvc)[1]
    return ranks
