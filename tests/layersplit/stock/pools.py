"""Pools that a release's own configurator builds, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

from tests.layersplit.stock import fakes

LAYERS, RANKS = 5, 2
"""Ranks of which one has a layer more."""
TOKENS = 63 * fakes.PAGE
"""With page 0, which is padding, 64 pages."""
DTYPES = ("bf16", "packed")


class Channel:
    """In the place of ours: no process group, nothing sent."""

    def __init__(self, ranks: list[int], device: Any) -> None:
        self.ranks = ranks

    def broadcast(self, owner: int, tensors: Any) -> None: ...


def build(server: Any, rank: int, ranks: int, tokens: int = TOKENS) -> Any:
    """What stock's `_build_dsa_kv_pool` builds on this rank now."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    method = KVCacheConfigurator._build_dsa_kv_pool
    arguments = {
        "max_total_num_tokens": tokens,
        "max_running_requests": 4,
        "dsa_pool_class": DSATokenToKVPool,
    }
    with fakes.parallel(rank, ranks), fakes.settings():
        return method(server, **fakes.known(method, arguments))


def ours(rank: int, dtype: str = "bf16", ranks: int = RANKS, layers: int = LAYERS) -> Any:
    """Our pool, with a small scratch: 1 page of padding, 16 of prefixes and 8 of new tokens."""
    from sglang_scaling_fixes.layersplit import scratch
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool as Split

    size = scratch.Size(prefix=16, chunk=8, requests=4)
    with (
        mock.patch.object(Split, "scratch_size", size),
        mock.patch("sglang_scaling_fixes.layersplit.pool.Channel", Channel),
    ):
        return build(fakes.server(layers=layers, dtype=dtype), rank, ranks)


def held(pool: Any) -> int:
    """Bytes of all buffers of KV and index keys that the pool keeps, wherever it keeps them."""
    import torch

    kinds = (pool.store_dtype, torch.uint8)
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors(vars(pool))
            if tensor.dtype in kinds
        }.values()
    )


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """All tensors within an object: in its attributes, lists, dicts and so on."""
    import torch

    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in list(value.values()):
            yield from tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item, seen)
    elif type(value).__module__.startswith(("sglang.srt.mem_cache", "sglang_scaling_fixes")):
        yield from tensors(vars(value), seen)


def said(pool: Any) -> dict[str, Any]:
    """Sizes, the names by which stock knows a split pool, and what transfers are told."""
    names = ("layer_shard_enabled", "layer_shard_rank", "layer_shard_size", "layer_shard_start")
    return {
        "class": f"{type(pool).__module__}:{type(pool).__name__}",
        "names": {name: getattr(pool, name) for name in names if hasattr(pool, name)},
        "owned": list(pool._owned_local_layer_range())
        if hasattr(pool, "_owned_local_layer_range")
        else None,
        "kv": [list(part) for part in pool.get_contiguous_buf_infos()[1:]],
        "state": [list(part) for part in pool.get_state_buf_infos()[1:]],
        "said": int(pool.get_kv_size_bytes()),
        "held": held(pool),
    }


def pointers(pool: Any) -> bool:
    """Whether what transfers are told are the owned layers' buffers, in their order."""
    start, end = pool._owned_local_layer_range()
    owned = range(start, end)
    kv = [pool.kv_buffer[i].data_ptr() for i in owned]
    index = [pool.index_k_with_scale_buffer[i].data_ptr() for i in owned]
    told = list(pool.get_contiguous_buf_infos()[0]), list(pool.get_state_buf_infos()[0])
    return told == (kv, index)


def stock() -> dict[str, Any]:
    """Before anything is attached: stock's split pool on each rank."""
    return {
        f"{dtype} {rank}": said(build(fakes.server(layers=LAYERS, dtype=dtype), rank, RANKS))
        for dtype in DTYPES
        for rank in range(RANKS)
    }


def attached() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for rank in range(RANKS):
            pool = ours(rank, dtype)
            scratches = sum(scratch.nbytes for scratch in pool.scratches)
            found[f"{dtype} {rank}"] = {
                **said(pool),
                "pointers": pointers(pool),
                "scratches": scratches,
                "channel": pool.channel.ranks,
            }
    draft = build(fakes.server(layers=1, dtype="packed", draft=True), 0, RANKS)
    found["draft"] = f"{type(draft).__module__}:{type(draft).__name__}"
    return found
