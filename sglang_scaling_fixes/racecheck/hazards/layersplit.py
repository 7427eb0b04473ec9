"""Stock's LayerSplit: each rank owns some layers and broadcasts them to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang_scaling_fixes.presence import exists
from sglang_scaling_fixes.racecheck import kv_stack, lookup, recording_cuda
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario
from sglang_scaling_fixes.racecheck.hazards.loads import read_index
from sglang_scaling_fixes.racecheck.kv_stack import LAYERS, KvStack
from sglang_scaling_fixes.racecheck.recorder import Recorder, active
from sglang_scaling_fixes.standin_objects import Lenient

_LAYER_SPLIT = "sglang.srt.mem_cache.dsa_cache_layer_split"


def prefetches() -> Iterator[Scenario]:
    """On the rank that owns the second half of the layers: prefetch ahead, then attend."""
    for communicator in ("own", "shared"):
        yield partial(_prefetch, own_communicator=communicator == "own")


def _prefetch(recorder: Recorder, own_communicator: bool) -> None:
    stack = _split_stack(recorder, own_communicator)
    prefetch = _prefetch_function(stack.pool)
    slots, consumer = stack.load()
    with stack.forward_batch(consumer), recording_cuda.torch_operations():
        for layer in range(LAYERS - 1):
            prefetch(
                Lenient(
                    attn_cp_metadata=object(),
                    forward_mode=Lenient(is_context_parallel_extend=lambda: True),
                ),
                layer + 1,
            )
            stack.pool.get_key_buffer(layer + 1)[slots].clone()


def split_reads() -> Iterator[Scenario]:
    for communicator in ("own", "shared"):
        yield partial(_split_read, own_communicator=communicator == "own")


def _split_read(recorder: Recorder, own_communicator: bool) -> None:
    """Index-K and KV of one layer after the other, without any prefetch ahead."""
    stack = _split_stack(recorder, own_communicator)
    slots, consumer = stack.load()
    with stack.forward_batch(consumer), recording_cuda.torch_operations():
        for layer in range(LAYERS):
            read_index(stack.pool, "get_index_k_scale_buffer", layer, slots)
            stack.pool.get_key_buffer(layer)[slots].clone()


def _split_stack(recorder: Recorder, own_communicator: bool) -> KvStack:
    if not exists(_LAYER_SPLIT):
        raise lookup.NotThere("this release has no LayerSplit")
    cls = lookup.find(f"{_LAYER_SPLIT}:LayerSplitDSATokenToKVPool")
    communicator = _Broadcasts()
    group = Lenient(world_size=1, pynccl_comm=communicator)  # 1: no NCCL here
    kv_stack.settings(attn_cp_group=group)
    pool = kv_stack.dsa_pool(cls, layer_shard_rank=1, layer_shard_size=2)
    if own_communicator:
        pool.layer_broadcast_comm = communicator
    stack = kv_stack.build(recorder, pool)
    kv_stack.settings(attn_cp_group=group)
    recorder.rename(pool.kv_broadcast_stream, "kv_broadcast")
    return stack


def _prefetch_function(pool: Any) -> Any:
    """The model's call, with the pool and the parallel mode it would find in a server."""
    function = lookup.find(
        "sglang.srt.layers.attention.dsa.utils:maybe_prefetch_next_full_attention_kv",
        "sglang.srt.layers.layer_boundary.adapters.context_parallel:"
        "maybe_prefetch_next_full_attention_kv",
        "sglang.srt.layers.communicator_dsa_cp:maybe_prefetch_next_full_attention_kv",
    )
    there = function.__globals__
    there["get_token_to_kv_pool"] = lambda: pool
    enabled = there["dsa_use_prefill_cp"].__globals__
    enabled["is_dsa_enable_prefill_cp"] = lambda: True
    return function


class _Broadcasts:
    """The owner's side of a broadcast: the scratch buffer is read, on the current stream."""

    def change_state(self, **_state: Any) -> Any:
        return contextlib.nullcontext()

    def broadcast(self, tensor: Any, src: int) -> None:
        active().kernel(f"broadcast from rank {src}", reads=recording_cuda.touched(tensor))


HAZARDS = (
    Hazard(
        "layersplit-prefetch-before-load",
        "does the prefetch of the next layer's KV wait for that layer's load?",
        prefetches,
    ),
    Hazard(
        "layersplit-read-before-load",
        "are a LayerSplit layer's index-K and KV broadcast only once they are loaded?",
        split_reads,
    ),
)
