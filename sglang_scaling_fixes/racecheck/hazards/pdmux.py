"""PD multiplexing: a split prefill and a decode batch share one GPU, on streams of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_scaling_fixes import ordering
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.racecheck import kv_stack, lookup, recording_cuda
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario
from sglang_scaling_fixes.racecheck.kv_stack import LAYERS
from sglang_scaling_fixes.racecheck.recorder import Recorder
from sglang_scaling_fixes.standin_objects import Lenient


def split_prefills() -> Iterator[Scenario]:
    if ordering.armed():
        try:
            ordering.check(Lenient(enable_pdmux=True, enable_hierarchical_cache=True))
        except ConfigError as refusal:
            raise lookup.NotThere(f"refused at start: {refusal}") from None
    yield _split_prefill


def _split_prefill(recorder: Recorder) -> None:
    """A split prefill of a batch with a load, after a decode batch that had none."""
    stock: Any = lookup.find("sglang.srt.managers.tp_worker:TpModelWorker")
    stack = kv_stack.build(recorder, kv_stack.dsa_pool())
    slots, consumer = stack.load()

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        for layer in range(LAYERS):
            stack.pool.get_key_buffer(layer)[slots].clone()
        return Lenient()

    class Worker(Lenient, stock):  # type: ignore[misc]
        model_runner = Lenient(forward=forward)

    this = Worker.__new__(Worker)
    this.__dict__["hicache_layer_transfer_counter"] = stack.counter
    this.__dict__["_maybe_finalize_elastic_cuda_graph_scale"] = lambda: None
    batch = Lenient(
        split_index=1,
        hicache_consumer_index=consumer,
        get_model_worker_batch=lambda *_a: Lenient(hicache_consumer_index=consumer),
    )
    with stack.forward_batch(-1), recording_cuda.torch_operations():
        this.forward_batch_split_prefill(batch)


HAZARDS = (
    Hazard(
        "pdmux-load-before-kv-read",
        "does a split prefill (PD multiplexing) wait for its own load?",
        split_prefills,
    ),
)
