"""Is the split in force on this release? Its own pool, built small, must say so by what it holds.

Two ranks of a pool of four layers take turns in this process: what one "broadcasts" is handed to
the other. Nothing here touches a GPU, a network or a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.layersplit import attach, scratch
from sglang_scaling_fixes.layersplit.lane import Lane, Sent
from sglang_scaling_fixes.layersplit.metrics import PREFILL
from sglang_scaling_fixes.layersplit.sizing import INDEX_BYTES
from sglang_scaling_fixes.metrics import Metrics

_PAGE, _PAGES, _LAYERS, _RANKS, _DIM = 64, 7, 4, 2, 576
_PREFIX, _NEW = 70, 60
"""A prefix that ends within a page, and new tokens that begin in that page and end in another."""


def run() -> None:
    """Raise `AttachError` for what does not hold."""
    if not attach.in_place():
        raise AttachError("probe: stock would build its own split pool")
    slots = _slots()
    sent: dict[int, list[Tensor]] = {}
    pools = [_pool(rank, sent) for rank in range(_RANKS)]
    expected = [torch.zeros(_PAGE * _PAGES, 1, _DIM, dtype=torch.bfloat16) for _ in range(_LAYERS)]
    draw = torch.Generator().manual_seed(1)
    for layer, rows in enumerate(expected):
        old = torch.randn(_PREFIX, 1, _DIM, generator=draw).bfloat16()
        rows[slots[:_PREFIX]] = old
        for pool in pools:
            if pool.owns(layer):
                pool.kv_buffer[layer][slots[:_PREFIX]] = old
    for pool in pools:
        pool.begin(slots[None], torch.tensor([0]), [_PREFIX], [_PREFIX + _NEW])
    for layer, rows in enumerate(expected):
        new = torch.randn(_NEW, 1, _DIM, generator=draw).bfloat16()
        rows[slots[_PREFIX:]] = new
        # The owner first: what it sends is there when the other asks for it.
        for pool in sorted(pools, key=lambda pool: not pool.owns(layer)):
            pool.set_kv_buffer(SimpleNamespace(layer_id=layer), slots[_PREFIX:], new, None)
        for rank, pool in enumerate(pools):
            seen = pool.get_key_buffer(layer)[pool.plan.slot(slots)]
            if not torch.equal(seen, rows[slots]):
                raise AttachError(f"probe: rank {rank} reads other KV of layer {layer} than it has")
            if pool.owns(layer) and not torch.equal(pool.kv_buffer[layer][slots], rows[slots]):
                raise AttachError(f"probe: rank {rank} does not keep layer {layer}, which it owns")


def _slots() -> Tensor:
    """KV slots by position, in pages that are not in order."""
    pages = torch.tensor([5, 2, 4])
    slots = (pages[:, None] * _PAGE + torch.arange(_PAGE)).flatten()
    return slots[: _PREFIX + _NEW]


class _Now(Sent):
    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work

    def wait(self) -> None:
        """The latest time that is allowed."""
        if self._work is not None:
            self._work()
        self._work = None


class _Late(Lane):
    """Does nothing before it is waited for."""

    def launch(self, work: Callable[[], None], *used: Tensor) -> Sent:
        del used
        return _Now(work)

    def exposed_ms(self) -> float:
        return 0.0


class _Hand:
    """Carries what an owner sends to the rank that asks after it."""

    def __init__(self, rank: int, sent: dict[int, list[Tensor]]) -> None:
        self._rank, self._sent = rank, sent

    def broadcast(self, owner: int, tensors: Sequence[Tensor]) -> None:
        if owner == self._rank:
            self._sent[owner] = [tensor.clone() for tensor in tensors]
            return
        for mine, theirs in zip(tensors, self._sent[owner], strict=True):
            mine.copy_(theirs)


def _pool(rank: int, sent: dict[int, list[Tensor]]) -> Any:
    """A pool of this release with its own methods. Stock's constructors want a running server."""
    from sglang_scaling_fixes.layersplit.pool import LayerSplitDSATokenToKVPool

    pool: Any = LayerSplitDSATokenToKVPool.__new__(LayerSplitDSATokenToKVPool)
    rows = _PAGE * _PAGES
    vars(pool).update(
        layer_shard_rank=rank,
        layer_shard_size=_RANKS,
        layer_num=_LAYERS,
        start_layer=0,
        page_size=_PAGE,
        size=rows - _PAGE,
        dtype=torch.bfloat16,
        store_dtype=torch.bfloat16,
        kv_lora_rank=_DIM - 64,
        dsa_kv_cache_store_fp8=False,
        # Asked for only to find out whether there is a DCP to mind, before 0.5.22 and since.
        write_loc_is_dcp_resolved=True,
        dcp_replicated=True,
        kernel_page_blocks=1,  # 0.5.19 to 0.5.21: more only in pools that stock calls unified
        layer_transfer_counter=None,
        stats=Metrics(PREFILL, None),
        size_of_scratch=scratch.size(_PAGE * _PAGES, _NEW, 2, _PAGE),
        channel=_Hand(rank, sent),
        lane=_Late(),
    )
    start, end = pool._owned_local_layer_range()
    kv = [torch.zeros(rows, 1, _DIM, dtype=torch.bfloat16) for _ in range(start, end)]
    index = [torch.zeros(_PAGES, _PAGE * INDEX_BYTES, dtype=torch.uint8) for _ in range(start, end)]
    pool.kv_buffer, index = pool._padded(kv), pool._padded(index)
    if isinstance(getattr(type(pool), "index_k_with_scale_buffer", None), property):
        pool.index_key_cache = SimpleNamespace(buffer=index)
    else:  # before 0.5.18
        pool.index_k_with_scale_buffer = index
    pool._create_scratches(index)
    pool._view = pool._scratch_as_pool()
    return pool
