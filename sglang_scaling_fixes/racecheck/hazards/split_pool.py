"""LayerSplit by `layer-split`: what is sent, when, and who waits, on each of two ranks.

A play watches only what its hazard is about, so that one missing wait turns one hazard. Where a
hazard is about one pass, it is played in the second half of the layers, which nobody's broadcast
overwrites: rank 1 owns them and rank 0 is their peer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from sglang_scaling_fixes.racecheck import kv_stack, recording_cuda, split_pool
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario
from sglang_scaling_fixes.racecheck.kv_stack import LAYERS, PAGE
from sglang_scaling_fixes.racecheck.recorder import Recorder, Stream
from sglang_scaling_fixes.racecheck.split_pool import RANKS
from sglang_scaling_fixes.standin_objects import Lenient

_FIRST, _LAST = range(LAYERS // 2), range(LAYERS // 2, LAYERS)
_PAGES = (5, 2, 4)
"""Of one request, out of order."""
_PREFIX, _TOKENS = 70, 130
"""Tokens before and after the pass: the prefix ends, and the new tokens begin, within a page."""

_KV_READS = ("get_key_buffer", "get_value_buffer", "get_mla_kv_buffer")
_INDEX_READS = (
    "get_index_k_with_scale_buffer",
    "get_index_k_continuous",
    "get_index_k_scale_continuous",
    "get_index_k_scale_buffer",
)
_WRITES = ("set_kv_buffer", "set_mla_kv_buffer", "set_index_k_scale_buffer")


# -- a forward pass -----------------------------------------------------------------------


def _slots() -> Any:
    """The KV slots of one request, by position."""
    import torch

    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in _PAGES])


def _begin(pool: Any, slots: Any, before: int, after: int, paged_index: bool = False) -> None:
    """A pass of one request that has `before` tokens in the pool and `after` when it is done."""
    import torch

    pool.begin(slots[None], torch.tensor([0]), [before], [after], paged_index=paged_index)


def _run(
    pool: Any,
    layers: Iterable[int] = (),
    access: Callable[[int], None] = lambda layer: None,
    leaves: bool = True,
) -> None:
    """All layers in their order; `access` is what happens in `layers`, nothing in the others.

    `leaves`: whether the model says that attention of a layer is launched. It does not in a batch
    that has too few new tokens for context parallelism.
    """
    for layer in range(LAYERS):
        if layer in layers:
            access(layer)
        else:
            pool.get_key_buffer(layer)
        if leaves and layer + 1 < LAYERS:
            pool.prefetch_kv_buffer(layer + 1)


def _read(pool: Any, accessor: str, slots: Any, layer: int) -> None:
    """Attention or the indexer reads these slots through an accessor of the pool."""
    import torch

    if accessor == "get_mla_kv_buffer":
        pool.get_mla_kv_buffer(_layer(layer), slots)
    elif accessor in _KV_READS:
        getattr(pool, accessor)(layer)[pool.plan.slot(slots)].clone()
    elif accessor == "get_index_k_with_scale_buffer":
        getattr(pool, accessor)(layer)[pool.plan.page(slots[::PAGE] // PAGE)].clone()
    else:
        offered = {
            "seq_len": len(slots),
            "seq_len_tensor": torch.tensor([len(slots)]),
            "page_indices": (slots[::PAGE] // PAGE)[None],
            "seq_len_sum": len(slots),
            "max_seq_len": len(slots),
        }
        stock = inspect.signature(getattr(kv_stack.dsa_pool_class(), accessor)).parameters
        given = [offered[name] for name in stock if name in offered]
        getattr(pool, accessor)(layer, *given)


def _write(pool: Any, writer: str, slots: Any, layer: int) -> None:
    """New tokens get these slots."""
    import torch

    if writer == "set_index_k_scale_buffer":
        pool.set_index_k_scale_buffer(layer, slots, None, None)
        return
    rope = pool.qk_rope_head_dim
    keys = torch.zeros(len(slots), 1, pool.kv_lora_rank + rope, dtype=pool.dtype)
    parts = (keys, keys) if writer == "set_kv_buffer" else (keys[..., :-rope], keys[..., -rope:])
    getattr(pool, writer)(_layer(layer), slots, *parts)


def _layer(layer: int) -> Any:
    return Lenient(layer_id=layer)


def _read_all(pool: Any, slots: Any, layer: int) -> None:
    """KV and index keys, as attention and the indexer of one layer do."""
    _read(pool, "get_index_k_scale_buffer", slots, layer)
    _read(pool, "get_key_buffer", slots, layer)


def _write_all(pool: Any, slots: Any, layer: int) -> None:
    _write(pool, "set_index_k_scale_buffer", slots, layer)
    _write(pool, "set_kv_buffer", slots, layer)


# -- the hazards --------------------------------------------------------------------------


def broadcasts_of_loads() -> Iterator[Scenario]:
    """Only owners load. Rank 0 owns layers that are sent at once, rank 1 those sent later."""
    split_pool.require()
    for rank in RANKS:
        yield partial(_broadcast_of_load, rank=rank)


def _broadcast_of_load(recorder: Recorder, rank: int) -> None:
    import torch

    pool = split_pool.build(recorder, rank)
    stack = kv_stack.build(recorder, pool)  # watches owned layers
    loaded, consumer = stack.load()
    slots = torch.cat([loaded, stack.allocator.alloc(PAGE)])
    with stack.forward_batch(consumer), recording_cuda.torch_operations():
        _begin(pool, slots, len(loaded), len(slots))
        _run(pool)


def reads_of_broadcasts() -> Iterator[Scenario]:
    """Every accessor alone: the first one to wait hides the rest."""
    split_pool.require()
    cls = kv_stack.dsa_pool_class()
    for accessor in (*_KV_READS, *_INDEX_READS):
        if hasattr(cls, accessor):
            for rank in RANKS:
                yield partial(_read_of_broadcast, rank=rank, accessor=accessor)


def _read_of_broadcast(recorder: Recorder, rank: int, accessor: str) -> None:
    pool, slots = split_pool.build(recorder, rank), _slots()
    split_pool.watch_scratches(recorder, pool)
    paged = accessor == "get_index_k_with_scale_buffer"
    with Stream(name="forward"), recording_cuda.torch_operations():
        _begin(pool, slots, _PREFIX, _TOKENS, paged_index=paged)
        _run(pool, _LAST, partial(_read, pool, accessor, slots[:_PREFIX]))


def writes_over_broadcasts() -> Iterator[Scenario]:
    """Every writer alone, into the page that the prefix fills partly."""
    split_pool.require()
    for writer in _WRITES:
        for rank in RANKS:
            yield partial(_write_over_broadcast, rank=rank, writer=writer)


def _write_over_broadcast(recorder: Recorder, rank: int, writer: str) -> None:
    pool, slots = split_pool.build(recorder, rank), _slots()
    kv_stack.watch(recorder, pool)
    split_pool.watch_scratches(recorder, pool)
    with Stream(name="forward"), recording_cuda.torch_operations():
        _begin(pool, slots, _PREFIX, _TOKENS)
        _run(pool, _LAST, partial(_write, pool, writer, slots[_PREFIX:_TOKENS]))


def reuses_of_scratches() -> Iterator[Scenario]:
    split_pool.require()
    for rank in RANKS:
        for leaves in (True, False):
            yield partial(_reuse_in_a_pass, rank=rank, leaves=leaves)
        yield partial(_reuse_by_the_next_pass, rank=rank)


def _reuse_in_a_pass(recorder: Recorder, rank: int, leaves: bool) -> None:
    """Layers 2 and 3 take the scratches of layers 0 and 1, whose own broadcasts are not watched."""
    pool, slots = split_pool.build(recorder, rank), _slots()
    with Stream(name="forward"), recording_cuda.torch_operations():
        _begin(pool, slots, _PREFIX, _TOKENS)
        split_pool.watch_scratches(recorder, pool)
        _run(pool, _FIRST, partial(_read_all, pool, slots[:_PREFIX]), leaves)


def _reuse_by_the_next_pass(recorder: Recorder, rank: int) -> None:
    """A pass reads what it wrote itself; the next one's first layers come by broadcast."""
    pool, slots = split_pool.build(recorder, rank), _slots()
    split_pool.watch_scratches(recorder, pool)
    with Stream(name="forward"), recording_cuda.torch_operations():
        _begin(pool, slots, 0, _PREFIX)
        _run(pool, _LAST, partial(_read_all, pool, slots[:_PREFIX]))
        _begin(pool, slots, _PREFIX, _TOKENS)
        _run(pool)


def packs_of_chunks() -> Iterator[Scenario]:
    split_pool.require()
    for rank in RANKS:
        yield partial(_pack_of_chunk, rank=rank)


def _pack_of_chunk(recorder: Recorder, rank: int) -> None:
    """The previous chunk's forward writes what is sent now, and to where it arrives."""
    pool, slots = split_pool.build(recorder, rank), _slots()
    kv_stack.watch(recorder, pool)
    split_pool.watch_scratches(recorder, pool)
    with Stream(name="forward"), recording_cuda.torch_operations():
        _begin(pool, slots, 0, _PREFIX)
        _run(pool, range(LAYERS), partial(_write_all, pool, slots[:_PREFIX]))
        _begin(pool, slots, _PREFIX, _TOKENS)
        _run(pool)


HAZARDS = (
    Hazard(
        "layersplit-broadcast-before-load",
        "layer-split: are a layer's KV and index-K sent only once they are loaded?",
        broadcasts_of_loads,
    ),
    Hazard(
        "layersplit-read-before-broadcast",
        "layer-split: are KV and index-K read only once they have arrived?",
        reads_of_broadcasts,
    ),
    Hazard(
        "layersplit-write-before-broadcast",
        "layer-split: is a prefix's last page written to only once it has arrived?",
        writes_over_broadcasts,
    ),
    Hazard(
        "layersplit-scratch-reuse-before-read",
        "layer-split: is a scratch overwritten only after its last reader?",
        reuses_of_scratches,
    ),
    Hazard(
        "layersplit-pack-before-write",
        "layer-split: does a broadcast wait for the previous chunk's forward?",
        packs_of_chunks,
    ),
)
