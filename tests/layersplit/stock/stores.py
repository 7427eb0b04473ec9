"""New index keys through the release's own indexer: to the scratch, and to the layer's owner."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_scaling_fixes.standin_objects import Lenient
from tests.layersplit.stock import fakes, pools, tables

LAYER = 0
"""Rank 0 owns it, rank 1 does not."""
DIM = 128


def quantized(key: Any, _block: int, _format: Any) -> tuple[Any, Any]:
    """In the place of a kernel for GPUs: fp8 values, and a scale for each row."""
    import torch

    scale = key.abs().amax(dim=-1, keepdim=True).float() / 448
    return (key.float() / scale).to(torch.float8_e4m3fn), scale


def fused(key: Any, buffer: Any, loc: Any, page_size: int) -> None:
    """In the place of a kernel for GPUs: quantise, and write to the buffer of a layer."""
    import torch

    values, scale = quantized(key, DIM, None)
    keys, scales = parts(buffer)
    keys[loc // page_size, loc % page_size] = values.view(torch.uint8)
    scales[loc // page_size, loc % page_size] = scale.view(torch.uint8)


def parts(buffer: Any) -> tuple[Any, Any]:
    """The keys and the scales of an index buffer `[pages, 64 * 132]`, by page and place."""
    edge = fakes.PAGE * DIM
    pages = len(buffer)
    keys, scales = buffer[:, :edge], buffer[:, edge:]
    return keys.view(pages, fakes.PAGE, DIM), scales.view(pages, fakes.PAGE, 4)


def at(buffer: Any, slots: Any) -> Any:
    """What a buffer holds for these slots: bytes `[slots, 132]`."""
    import torch

    page, place = slots // fakes.PAGE, slots % fakes.PAGE
    return torch.cat([part[page, place] for part in parts(buffer)], dim=-1)


@contextlib.contextmanager
def machine(pool: Any, fuses: bool) -> Iterator[None]:
    """The indexer's pool, and whether it has a GPU's kernels: then our stand-ins for them."""
    from sglang.srt.layers.attention.dsa import dsa_indexer

    changes = {
        "get_token_to_kv_pool": lambda: pool,
        "_is_cuda": fuses,
        "_use_aiter": False,
        "can_use_dsa_fused_store": lambda *_args, **_kwargs: True,
        "fused_store_index_k_cache": fused,
    }
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            # The kernel's name is there only where there is a GPU.
            stack.enter_context(mock.patch.object(dsa_indexer, name, value, create=True))
        yield


def store(method: Callable[..., None], pool: Any, key: Any, loc: Any, fuses: bool) -> str:
    """Run the indexer's store on a layer; the error's name if there was one."""
    indexer = SimpleNamespace(block_size=DIM, scale_fmt=None)
    batch = Lenient(out_cache_loc=loc)
    with machine(pool, fuses), fakes.parallel(0, 1):
        try:
            method(indexer, batch, LAYER, key, act_quant=quantized)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def case(rank: int, fuses: bool, wrapped: bool) -> dict[str, Any]:
    """`wrapped` False: stock's own method on our pool."""
    import torch
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    ours: Any = Indexer._store_index_k_cache
    stock = inspect.unwrap(ours)
    table = tables.req_to_token()
    before, after = tables.EXTEND.prefix[0], tables.EXTEND.seq[0]
    loc = table[3, before:after].long()
    key = torch.randn(after - before, DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = pools.build(fakes.server(layers=pools.LAYERS, dtype="bf16", split=False), 0, 1)
    store(stock, whole, key, loc, fuses)
    expected = at(whole.index_k_with_scale_buffer[LAYER], loc)
    pool = pools.ours(rank)
    pool.lane = tables.Never()
    plan = pool.begin(table, torch.tensor([3]), [before], [after])
    error = store(ours if wrapped else stock, pool, key, loc, fuses)
    own = pool.index_k_with_scale_buffer[LAYER]
    scratch = pool.scratches[LAYER].index
    rest = torch.ones(fakes.PAGE * len(scratch), dtype=torch.bool)
    rest[plan.slot(loc)] = False
    return {
        "something": bool(expected.any()),
        "scratch": torch.equal(at(scratch, plan.slot(loc)), expected),
        "nothing else": not at(scratch, rest.nonzero().flatten()).any().item(),
        "owner": torch.equal(at(own, loc), expected) if len(own) else None,
        "error": error,
    }


def fused_parameters() -> dict[str, str]:
    """Of `_fused_k_prepare_and_store`, as stock has it: name and kind."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    method = inspect.unwrap(Indexer._fused_k_prepare_and_store)
    parameters = inspect.signature(method).parameters
    return {name: parameter.kind.name for name, parameter in parameters.items()}


def attached() -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{'fused' if fuses else 'fallback'} {rank}": case(rank, fuses, wrapped=True)
        for fuses in (False, True)
        for rank in range(pools.RANKS)
    }
    found["stock's method"] = [case(rank, True, wrapped=False) for rank in range(pools.RANKS)]
    found["parameters"] = fused_parameters()
    return found
