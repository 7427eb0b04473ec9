"""A load and its readers; loads and write-backs while forwards are still in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sglang_scaling_fixes import ordering
from sglang_scaling_fixes.ordering import loads, probe
from sglang_scaling_fixes.racecheck import kv_stack, lookup, recording_cuda
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario
from sglang_scaling_fixes.racecheck.kv_stack import LAYERS, PAGE, KvStack
from sglang_scaling_fixes.racecheck.recorder import Recorder


def index_reads() -> Iterator[Scenario]:
    """Every accessor of index-K that the release has, alone: the first to wait hides the rest."""
    cls = kv_stack.dsa_pool_class()
    for name in (
        "get_index_k_with_scale_buffer",
        "get_index_k_continuous",
        "get_index_k_scale_continuous",
        "get_index_k_scale_buffer",
    ):
        if hasattr(cls, name):
            yield partial(_index_read, accessor=name)


def _index_read(recorder: Recorder, accessor: str) -> None:
    stack = kv_stack.build(recorder, kv_stack.dsa_pool())
    slots, consumer = stack.load()
    with stack.forward_batch(consumer), recording_cuda.torch_operations():
        for layer in range(LAYERS):
            read_index(stack.pool, accessor, layer, slots)


def read_index(pool: Any, accessor: str, layer: int, slots: Any) -> None:
    """Read the index-K of these token slots in one layer, through an accessor of the pool."""
    import torch

    pages = slots[::PAGE] // PAGE
    found = lookup.call(
        getattr(pool, accessor),
        layer_id=layer,
        seq_len=len(slots),
        seq_len_tensor=torch.tensor([len(slots)]),
        page_indices=pages[None],
        seq_len_sum=len(slots),
        max_seq_len=len(slots),
    )
    if isinstance(found, torch.Tensor):
        found[pages].clone()  # a kernel that takes the whole buffer and reads these pages


def kv_reads() -> Iterator[Scenario]:
    for make in (kv_stack.dsa_pool, kv_stack.mha_pool):
        for name in ("get_key_buffer", "get_value_buffer", "get_kv_buffer"):
            yield partial(_kv_read, make=make, accessor=name)


def _kv_read(recorder: Recorder, make: Callable[[], Any], accessor: str) -> None:
    stack = kv_stack.build(recorder, make())
    slots, consumer = stack.load()
    with stack.forward_batch(consumer), recording_cuda.torch_operations():
        for layer in range(LAYERS):
            found = getattr(stack.pool, accessor)(layer)
            for buffer in found if isinstance(found, tuple) else (found,):
                buffer[slots].clone()


def loads_over_writes() -> Iterator[Scenario]:
    for make in (kv_stack.dsa_pool, kv_stack.mha_pool):
        yield partial(_load_over_write, make=make)


def _load_over_write(recorder: Recorder, make: Callable[[], Any]) -> None:
    """A request ends while the next forward still writes its last token; its pages are loaded."""
    stack = _served(recorder, make())
    slots = stack.allocator.alloc(2 * PAGE)
    with stack.forward_batch(-1):
        recorder.kernel("forward writes KV", writes=stack.kv_pages(slots))
    stack.allocator.free[:0] = sorted({int(slot) // PAGE for slot in slots})  # reclaimed
    stack.load()


def write_backs() -> Iterator[Scenario]:
    for make in (kv_stack.dsa_pool, kv_stack.mha_pool):
        yield partial(_write_back, make=make)


def _write_back(recorder: Recorder, make: Callable[[], Any]) -> None:
    """A request is cached while the forward that writes its last token is still in flight."""
    stack = _served(recorder, make())
    slots = stack.allocator.alloc(2 * PAGE)
    with stack.forward_batch(-1):
        recorder.kernel("forward writes KV", writes=stack.kv_pages(slots))
    stack.write_back(slots)


def _served(recorder: Recorder, pool: Any) -> KvStack:
    """A stack that a scheduler of this release has taken into use."""
    stack = kv_stack.build(recorder, pool)
    probe.hand_over_streams(stack.controller, stack.forward)
    if ordering.binds_streams():
        loads.bind(stack.controller, stack.forward)
    return stack


HAZARDS = (
    Hazard("load-before-index-read", "is index-K read only once it is loaded?", index_reads),
    Hazard("load-before-kv-read", "is KV read only once it is loaded?", kv_reads),
    Hazard(
        "load-over-inflight-write",
        "does a load wait for the forward that still writes its pages?",
        loads_over_writes,
    ),
    Hazard(
        "writeback-before-forward-write",
        "does a write-back wait for the forward that still writes its pages?",
        write_backs,
    ),
)
