"""HiCache loads on a GPU: what is read too early is stale, and waiting keeps the overlap.

The installed release's own pools, kernels and controller on real streams. Every device page
holds poison and every host page a value; the load is held up on its stream, so that a read
that does not wait for it finds poison. Run by hand: `pytest -m gpu tests/gpu`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from sglang_scaling_fixes.ordering import loads
from sglang_scaling_fixes.racecheck import kv_stack
from sglang_scaling_fixes.racecheck.kv_stack import LAYERS, PAGE, KvStack
from sglang_scaling_fixes.standin_objects import Lenient

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

POISON, VALUE = 7, 3
HOLD = 200_000_000
"""Cycles that a load is held up: about 0.1 s."""
STEP = 20_000_000
"""Cycles of one layer's load, and of one layer's compute, where overlap is measured."""

Seen = dict[str, list[torch.Tensor]]


def make(**more: Any) -> KvStack:
    """A stack on this GPU with poison on the device and the value on the host."""
    kv_stack.settings()
    pool = kv_stack.dsa_pool(device="cuda", **more)
    stack = kv_stack.assemble(None, pool, torch.cuda.current_stream(), torch.cuda.Stream())
    for buffer in [*pool.kv_buffer, *pool.index_k_with_scale_buffer]:
        buffer.fill_(POISON)
    group = stack.controller.mem_pool_host
    hosts = [entry.host_pool for entry in getattr(group, "entries", ())] or [group]
    for host in hosts:
        for name in ("kv_buffer", "index_k_with_scale_buffer"):
            buffers = getattr(host, name, None)
            for buffer in buffers if isinstance(buffers, list | tuple) else (buffers,):
                if buffer is not None:
                    buffer.fill_(VALUE)
    torch.cuda.synchronize()
    return stack


def load_stream(stack: KvStack) -> torch.cuda.Stream:
    engine = getattr(stack.controller, "l2_transfer_engine", None)
    if engine is None:
        return stack.controller.load_stream
    return engine.host_to_device_stream


def held_up(stack: KvStack) -> tuple[torch.Tensor, int]:
    """Start a load that takes its time."""
    with torch.cuda.stream(load_stream(stack)):
        torch.cuda._sleep(HOLD)
    return stack.load()


@contextlib.contextmanager
def forward(stack: KvStack, consumer: int) -> Iterator[None]:
    """On the forward stream, as the scheduler enters it."""
    with torch.cuda.stream(stack.forward_batch(consumer)):
        yield
    torch.cuda.synchronize()


def stale(seen: list[torch.Tensor]) -> int:
    """How many of these reads saw anything but the loaded value."""
    torch.cuda.synchronize()
    return sum(bool((read != VALUE).any()) for read in seen)


def index_reads(stack: KvStack, *, guarded: bool) -> list[torch.Tensor]:
    slots, consumer = held_up(stack)
    pages = slots[::PAGE] // PAGE
    seen = []
    with forward(stack, consumer):
        for layer in range(LAYERS):
            # Unguarded is what the ragged readers of index-K were up to 0.5.10.post1.
            buffer = (
                stack.pool.get_index_k_with_scale_buffer(layer)
                if guarded
                else stack.pool.index_k_with_scale_buffer[layer]
            )
            seen.append(buffer[pages].clone())
    return seen


def test_index_k() -> None:
    assert stale(index_reads(make(), guarded=False)) == LAYERS
    assert stale(index_reads(make(), guarded=True)) == 0


def kv_reads(stack: KvStack, *, guarded: bool) -> list[torch.Tensor]:
    slots, consumer = held_up(stack)
    seen = []
    with forward(stack, consumer if guarded else -1):
        for layer in range(LAYERS):
            seen.append(stack.pool.get_key_buffer(layer)[slots].clone())
    return seen


def test_kv() -> None:
    assert stale(kv_reads(make(), guarded=False)) == LAYERS
    assert stale(kv_reads(make(), guarded=True)) == 0


class OneRank:
    """A communicator whose other ranks do not matter: the owner's copy is the broadcast."""

    def change_state(self, **_state: Any) -> Any:
        return contextlib.nullcontext()

    def broadcast(self, _tensor: torch.Tensor, src: int) -> None: ...


def split_reads(*, fixed: bool) -> list[torch.Tensor]:
    module = pytest.importorskip("sglang.srt.mem_cache.dsa_cache_layer_split")
    communicator = OneRank()
    group = Lenient(world_size=1, pynccl_comm=communicator)
    cls = module.LayerSplitDSATokenToKVPool
    with contextlib.ExitStack() as undo:
        if fixed:
            stock = cls.prefetch_kv_buffer
            loads.attach_prefetch()
            undo.callback(setattr, cls, "prefetch_kv_buffer", stock)
        with mock.patch.object(kv_stack, "settings", _settings_with(group)):
            stack = make(cls=cls, layer_shard_rank=1, layer_shard_size=2)
        stack.pool.layer_broadcast_comm = communicator
        slots, consumer = held_up(stack)
        seen = []
        with forward(stack, consumer):
            for layer in range(LAYERS // 2, LAYERS):  # those that this rank owns
                stack.pool.prefetch_kv_buffer(layer)
                seen.append(stack.pool.get_key_buffer(layer)[slots].clone())
    return seen


def _settings_with(group: Any, settings: Any = kv_stack.settings) -> Any:
    return lambda **_more: settings(attn_cp_group=group)


def test_layersplit_prefetch() -> None:
    assert stale(split_reads(fixed=False)) == LAYERS // 2
    assert stale(split_reads(fixed=True)) == 0


def milliseconds(stack: KvStack, *, loading: bool, computing: bool) -> float:
    """One batch: each layer loaded for `STEP` cycles, read, and computed for `STEP` cycles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    slots, consumer = stack.load() if loading else (None, -1)
    with torch.cuda.stream(stack.forward_batch(consumer)):
        for layer in range(LAYERS):
            buffer = stack.pool.get_key_buffer(layer)
            if slots is not None:
                buffer[slots].clone()
            if computing:
                torch.cuda._sleep(STEP)
        end.record()
    end.synchronize()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def test_overlap_survives(record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured, not asserted: with every wait in place, both at once against the longer one."""
    stack = make()
    for events in stack.counter.events:
        complete = events.complete
        events.complete = lambda layer, complete=complete: (
            torch.cuda._sleep(STEP),
            complete(layer),
        )
    milliseconds(stack, loading=False, computing=True)  # warm
    compute = milliseconds(stack, loading=False, computing=True)
    load = milliseconds(stack, loading=True, computing=False)
    both = milliseconds(stack, loading=True, computing=True)
    ratio = both / max(load, compute)
    record_property("load_ms", load)
    record_property("compute_ms", compute)
    record_property("both_ms", both)
    record_property("both_over_longer", ratio)
    with capsys.disabled():
        print(f"\nload {load:.1f} ms, compute {compute:.1f} ms, both {both:.1f} ms: {ratio:.2f}x")
    assert both > 0
