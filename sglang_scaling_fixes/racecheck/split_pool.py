"""The pool of `layer-split` on recording streams: one of two ranks, whose peer is a channel.

The pool, its plan, its schedule and its stream are those of a server with a GPU. Only the broadcast
is a recorder, since there is no other rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from sglang_scaling_fixes.attach import is_wrapped
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.layersplit import FIX, points, scratch
from sglang_scaling_fixes.layersplit.lane import StreamLane
from sglang_scaling_fixes.ordering import loads
from sglang_scaling_fixes.presence import exists
from sglang_scaling_fixes.racecheck import kv_stack, recording_cuda
from sglang_scaling_fixes.racecheck.kv_stack import DEVICE_PAGES, PAGE
from sglang_scaling_fixes.racecheck.lookup import NotThere
from sglang_scaling_fixes.racecheck.recorder import Recorder, active
from sglang_scaling_fixes.standin_objects import Lenient

RANKS = (0, 1)
"""Rank 0 owns the first half of the layers, rank 1 the other; each is the other's peer."""

_armed = False


def arm() -> str:
    """Attach `layer-split` as the plugin would: the proof. Raises `AttachError` as it does.

    Stock's class is put back afterwards, since stock's split has hazards of its own.
    """
    global _armed  # noqa: PLW0603 - what is attached is attached to the whole process
    if not exists(points.MODULE):
        return "this release has no LayerSplit"
    there = vars(importlib.import_module(points.MODULE))
    stock = there["LayerSplitDSATokenToKVPool"]
    ordered = is_wrapped(loads.PREFETCH)
    proof = FIX.arm(Config()).proof
    there["LayerSplitDSATokenToKVPool"] = stock
    if ordered:  # what leaves with stock's class comes back with it
        loads.attach_prefetch()
    _armed = True
    return proof


def require() -> None:
    """Raise `NotThere` unless `layer-split` is attached."""
    if not exists(points.MODULE):
        raise NotThere("this release has no LayerSplit")
    if not _armed:
        raise NotThere("layer-split is not attached: its pool is checked with the fixes on")


def build(recorder: Recorder, rank: int) -> Any:
    """The pool of this rank. Nothing of it is watched yet."""
    from sglang_scaling_fixes.layersplit import pool as module

    cls = module.LayerSplitDSATokenToKVPool
    vars(module).update(
        Channel=partial(_Channel, rank),
        lane=StreamLane,
        get_parallel=lambda: Lenient(attn_cp_group=Lenient(ranks=RANKS)),
    )
    cls.scratch_size = scratch.size(2 * DEVICE_PAGES * PAGE, PAGE, 2, PAGE)
    pool = kv_stack.dsa_pool(cls, layer_shard_rank=rank, layer_shard_size=len(RANKS))
    cls.current = None  # a scheduler of another hazard would ask it what it may admit
    recording_cuda.replace_kernels()  # of what was imported for it
    recorder.rename(pool.lane._stream, "broadcast")
    return pool


def watch_scratches(recorder: Recorder, pool: Any) -> None:
    """Watch both scratches. A region names its rank: one is an owner where the other is a peer."""
    for number, both in enumerate(pool.scratches):
        for kind, buffer, rows in (("kv", both.kv, PAGE), ("index_k", both.index, 1)):
            page = rows * buffer.stride(0) * buffer.element_size()
            name = f"rank {pool.layer_shard_rank}: scratch[{number}].{kind}"
            recorder.watch(name, buffer, page_bytes=page)


class _Channel:
    """A broadcast as one rank sees it: the owner's scratch is read, and a peer's is written."""

    def __init__(self, rank: int, _ranks: Sequence[int], _device: Any) -> None:
        self._rank = rank

    def broadcast(self, owner: int, tensors: Sequence[Any]) -> None:
        pages = recording_cuda.touched(list(tensors))
        if owner == self._rank:
            active().kernel("broadcast to the peers", reads=pages)
        else:
            active().kernel(f"broadcast from rank {owner}", writes=pages)
