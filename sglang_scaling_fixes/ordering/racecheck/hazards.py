"""The hazards, each a short scenario played with the release's own classes.

A scenario says who does what in which order on the host; whether two accesses are ordered
is what the release's own code made of it. To add one: write the function, add its line to
`HAZARDS`. It raises `NotThere` where the release does not have what the hazard is about.

The scenario plays the scheduler, in the order of `Scheduler.run_batch`: loads are started on
the schedule stream, the batch's consumer index is set, the forward stream waits for the
schedule stream, the forward runs on the forward stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang_scaling_fixes import ordering
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.ordering import early_send, loads, probe, statements
from sglang_scaling_fixes.ordering.racecheck import face, stack
from sglang_scaling_fixes.ordering.racecheck.recorder import Recorder, Stream, active
from sglang_scaling_fixes.ordering.racecheck.stack import LAYERS, PAGE, NotThere, Stack
from sglang_scaling_fixes.ordering.statements import Lenient
from sglang_scaling_fixes.ordering.transfer import Transfer

Scenario = Callable[[Recorder], None]


@dataclass(frozen=True)
class Hazard:
    """`plays` are run one by one, each in a history of its own."""

    name: str
    asks: str
    plays: Callable[[], Iterator[Scenario]]


# -- a load and its readers -------------------------------------------------------------


def index_reads() -> Iterator[Scenario]:
    """Every accessor of index-K that the release has, alone: the first to wait hides the rest."""
    cls = stack.dsa_pool_class()
    for name in (
        "get_index_k_with_scale_buffer",
        "get_index_k_continuous",
        "get_index_k_scale_continuous",
        "get_index_k_scale_buffer",
    ):
        if hasattr(cls, name):
            yield partial(_index_read, accessor=name)


def _index_read(recorder: Recorder, accessor: str) -> None:
    world = stack.build(recorder, stack.dsa_pool())
    slots, consumer = world.load()
    with world.forward_batch(consumer), face.torch_operations():
        for layer in range(LAYERS):
            _read_index(world.pool, accessor, layer, slots)


def _read_index(pool: Any, accessor: str, layer: int, slots: Any) -> None:
    import torch

    pages = slots[::PAGE] // PAGE
    found = stack.call(
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
    for make in (stack.dsa_pool, stack.mha_pool):
        for name in ("get_key_buffer", "get_value_buffer", "get_kv_buffer"):
            yield partial(_kv_read, make=make, accessor=name)


def _kv_read(recorder: Recorder, make: Callable[[], Any], accessor: str) -> None:
    world = stack.build(recorder, make())
    slots, consumer = world.load()
    with world.forward_batch(consumer), face.torch_operations():
        for layer in range(LAYERS):
            found = getattr(world.pool, accessor)(layer)
            for buffer in found if isinstance(found, tuple) else (found,):
                buffer[slots].clone()


# -- forwards still in flight ------------------------------------------------------------


def loads_over_writes() -> Iterator[Scenario]:
    for make in (stack.dsa_pool, stack.mha_pool):
        yield partial(_load_over_write, make=make)


def _load_over_write(recorder: Recorder, make: Callable[[], Any]) -> None:
    """A request ends while the next forward still writes its last token; its pages are loaded."""
    world = _served(recorder, make())
    slots = world.allocator.alloc(2 * PAGE)
    with world.forward_batch(-1):
        recorder.kernel("forward writes KV", writes=world.kv_pages(slots))
    world.allocator.free[:0] = sorted({int(slot) // PAGE for slot in slots})  # reclaimed
    world.load()


def write_backs() -> Iterator[Scenario]:
    for make in (stack.dsa_pool, stack.mha_pool):
        yield partial(_write_back, make=make)


def _write_back(recorder: Recorder, make: Callable[[], Any]) -> None:
    """A request is cached while the forward that writes its last token is still in flight."""
    world = _served(recorder, make())
    slots = world.allocator.alloc(2 * PAGE)
    with world.forward_batch(-1):
        recorder.kernel("forward writes KV", writes=world.kv_pages(slots))
    world.write_back(slots)


def _served(recorder: Recorder, pool: Any) -> Stack:
    """A stack that a scheduler of this release has taken into use."""
    world = stack.build(recorder, pool)
    statements.hand_over_streams(world.controller, world.forward)
    if ordering.binds_streams():
        loads.bind(world.controller, world.forward)
    return world


# -- LayerSplit -------------------------------------------------------------------------

_LAYER_SPLIT = "sglang.srt.mem_cache.dsa_cache_layer_split"


def prefetches() -> Iterator[Scenario]:
    """On the rank that owns the second half of the layers: prefetch ahead, then attend."""
    for communicator in ("own", "shared"):
        yield partial(_prefetch, own_communicator=communicator == "own")


def _prefetch(recorder: Recorder, own_communicator: bool) -> None:
    world = _split_stack(recorder, own_communicator)
    prefetch = _prefetch_function(world.pool)
    slots, consumer = world.load()
    with world.forward_batch(consumer), face.torch_operations():
        for layer in range(LAYERS - 1):
            prefetch(
                Lenient(
                    attn_cp_metadata=object(),
                    forward_mode=Lenient(is_context_parallel_extend=lambda: True),
                ),
                layer + 1,
            )
            world.pool.get_key_buffer(layer + 1)[slots].clone()


def split_reads() -> Iterator[Scenario]:
    for communicator in ("own", "shared"):
        yield partial(_split_read, own_communicator=communicator == "own")


def _split_read(recorder: Recorder, own_communicator: bool) -> None:
    """Index-K and KV of one layer after the other, without any prefetch ahead."""
    world = _split_stack(recorder, own_communicator)
    slots, consumer = world.load()
    with world.forward_batch(consumer), face.torch_operations():
        for layer in range(LAYERS):
            _read_index(world.pool, "get_index_k_scale_buffer", layer, slots)
            world.pool.get_key_buffer(layer)[slots].clone()


def _split_stack(recorder: Recorder, own_communicator: bool) -> Stack:
    if not probe.exists(_LAYER_SPLIT):
        raise NotThere("this release has no LayerSplit")
    cls = stack.find(f"{_LAYER_SPLIT}:LayerSplitDSATokenToKVPool")
    communicator = _Broadcasts()
    group = Lenient(world_size=1, pynccl_comm=communicator)  # 1: no NCCL here
    stack.settings(attn_cp_group=group)
    pool = stack.dsa_pool(cls, layer_shard_rank=1, layer_shard_size=2)
    if own_communicator:
        pool.layer_broadcast_comm = communicator
    world = stack.build(recorder, pool)
    stack.settings(attn_cp_group=group)
    recorder.rename(pool.kv_broadcast_stream, "kv_broadcast")
    return world


def _prefetch_function(pool: Any) -> Any:
    """The model's call, with the pool and the parallel mode it would find in a server."""
    function = stack.find(
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
        active().kernel(f"broadcast from rank {src}", reads=face.touched(tensor))


# -- PD multiplexing --------------------------------------------------------------------


def split_prefills() -> Iterator[Scenario]:
    if ordering.armed():
        try:
            ordering.check(Lenient(enable_pdmux=True, enable_hierarchical_cache=True))
        except ConfigError as refusal:
            raise NotThere(f"refused at start: {refusal}") from None
    yield _split_prefill


def _split_prefill(recorder: Recorder) -> None:
    """A split prefill of a batch with a load, after a decode batch that had none."""
    stock: Any = stack.find("sglang.srt.managers.tp_worker:TpModelWorker")
    world = stack.build(recorder, stack.dsa_pool())
    slots, consumer = world.load()

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        for layer in range(LAYERS):
            world.pool.get_key_buffer(layer)[slots].clone()
        return Lenient()

    class Worker(Lenient, stock):  # type: ignore[misc]
        model_runner = Lenient(forward=forward)

    this = Worker.__new__(Worker)
    this.__dict__["hicache_layer_transfer_counter"] = world.counter
    this.__dict__["_maybe_finalize_elastic_cuda_graph_scale"] = lambda: None
    batch = Lenient(
        split_index=1,
        hicache_consumer_index=consumer,
        get_model_worker_batch=lambda *_a: Lenient(hicache_consumer_index=consumer),
    )
    with world.forward_batch(-1), face.torch_operations():
        this.forward_batch_split_prefill(batch)


# -- early send of a cached prefix (prefill/decode disaggregation) ------------------------


def early_sends(backend: str) -> Callable[[], Iterator[Scenario]]:
    return lambda: iter([partial(_early_send, backend=backend)])


def _early_send(recorder: Recorder, backend: str) -> None:
    """The previous forward still writes the prefix that this batch's request sends early."""
    _require_early_send()
    world = stack.build(recorder, stack.dsa_pool())
    slots = world.allocator.alloc(2 * PAGE)
    pages = world.kv_pages(slots)
    with world.forward_batch(-1):
        recorder.kernel("forward writes KV", writes=pages)
    transfer = Transfer(
        backend, look=lambda: recorder.kernel("transfer worker reads KV", reads=pages)
    )
    scheduler = probe.prefill_scheduler(lambda _req: transfer.send(), world.forward, PAGE)
    batch = probe.batch(transfer.sender, loading=False, prefix=len(slots))
    probe.run_early_sends(scheduler, batch)
    with recorder.thread("RDMA read"):
        transfer.work()


def early_sends_of_loads() -> Iterator[Scenario]:
    yield _early_send_of_load


def _early_send_of_load(recorder: Recorder) -> None:
    """A load started for this batch brings pages that a later request matched on the device.

    The reader is the best that could be: it waits for whatever event it is given.
    """
    _require_early_send()
    world = stack.build(recorder, stack.dsa_pool())
    slots, _consumer = world.load()
    nic = Stream(name="RDMA read")

    def send(req: Any) -> None:
        if (event := req.disagg_kv_sender._early_send_wait_event) is not None:
            event.wait(nic)
        recorder.kernel("send of the cached prefix", reads=world.kv_pages(slots), stream=nic)

    scheduler = probe.prefill_scheduler(send, world.forward, PAGE)
    probe.run_early_sends(scheduler, probe.batch(Lenient(), loading=True, prefix=len(slots)))


def _require_early_send() -> None:
    if not probe.sends_early():
        stack.find(early_send.MIXIN)
        raise NotThere("this release does not send cached prefixes early")


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
    Hazard(
        "pdmux-load-before-kv-read",
        "does a split prefill (PD multiplexing) wait for its own load?",
        split_prefills,
    ),
    Hazard(
        "early-send-before-write-nixl",
        "does NIXL wait for the forward that still writes a prefix sent early?",
        early_sends("nixl"),
    ),
    Hazard(
        "early-send-before-write-mooncake",
        "does Mooncake wait for the forward that still writes a prefix sent early?",
        early_sends("mooncake"),
    ),
    Hazard(
        "early-send-before-load",
        "is a prefix sent early only once it is loaded?",
        early_sends_of_loads,
    ),
)
