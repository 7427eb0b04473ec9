"""A chunk of a chunked prefill (prefill/decode disaggregation), sent while later chunks run.

The release's own scheduler runs its own loop over one prompt of several chunks. Stand-ins are only
what it would get from a model, a server and other requests. Every read of a device's tensor waits,
as it does on a GPU, for what was launched on the stream it is read on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang_scaling_fixes.early_send_ordering.transfer import BACKENDS, Transfer
from sglang_scaling_fixes.racecheck import kv_stack, lookup
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario
from sglang_scaling_fixes.racecheck.kv_stack import PAGE, KvStack
from sglang_scaling_fixes.racecheck.recorder import Recorder, Stream, active
from sglang_scaling_fixes.standin_objects import Lenient

_CHUNKS = 3
"""Chunks that are launched, one in each turn. Nobody waits for the last one's result."""


@dataclass(frozen=True)
class Loop:
    """A loop of a prefill's scheduler: stock's name of it, and this rank among pipeline stages."""

    name: str
    pp_size: int = 1
    last: bool = True
    ahead: int = 0
    """Micro-batches that are launched before a result is asked for."""

    @property
    def rank(self) -> int:
        return self.pp_size - 1 if self.last else 0


OVERLAP, NORMAL = Loop("overlap"), Loop("normal")
PIPELINE = [Loop("pp", 2, last, ahead) for last in (False, True) for ahead in (0, 1)]


class _Absent(int):
    """What nobody has: false, zero, empty, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_args: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, _key: Any) -> Any:
        return self


_ABSENT = _Absent()


class _Has(Lenient):
    """Has the attributes it is given. Every other one is absent."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ABSENT


def chunks(backends: Iterable[str], loops: Sequence[Loop]) -> Callable[[], Iterator[Scenario]]:
    return lambda: (
        partial(_chunks, backend=backend, loop=loop) for backend in backends for loop in loops
    )


_NO_REQUESTS = (
    "recv_requests",
    "ingest_requests",
    "process_input_requests",
    "process_bootstrapped_queue",
    "process_disagg_prefill_inflight_queue",
    "_pp_send_pyobj_to_next_stage",
    "_pp_recv_pyobj_from_prev_stage",
    "_pp_recv_proxy_tensors",
    "_pp_pd_get_bootstrapped_ids",
    "_pp_pd_get_prefill_transferred_ids",
)
"""Methods about other requests and other stages, of which there are none."""
_NO_AGREEMENT = ("_pp_pd_send_consensus_bootstrapped_ids", "_pp_pd_send_consensus_release_ids")
"""Methods that give a message's handle and what the stages agreed on."""


class _Ended(BaseException):
    """Ends the scheduler's endless loop."""


def _chunks(recorder: Recorder, backend: str, loop: Loop) -> None:
    stack = kv_stack.build(recorder, kv_stack.dsa_pool())
    if loop.pp_size > 1:
        kv_stack.settings(
            pp_size=loop.pp_size,
            pp_rank=loop.rank,
            pp_async_batch_depth=loop.ahead,
        )
    sent: set[int] = set()
    request = _request(recorder, stack, backend, sent)
    scheduler = _scheduler(recorder, stack, request, loop)
    with contextlib.suppress(_Ended), stack.schedule:
        getattr(scheduler, f"event_loop_{loop.name}_disagg_prefill")()
    if len(sent) < _CHUNKS - 1:
        raise lookup.Moved(f"the loop {loop.name} has sent {len(sent)} of {_CHUNKS - 1} chunks")


def _device(values: Any) -> Any:
    """A tensor on the device: to look at it the host waits for the current stream."""
    import torch

    class Device(torch.Tensor):  # type: ignore[misc]
        def cpu(self) -> Any:
            active().synchronize(active().current)
            return self.as_subclass(torch.Tensor)

        def tolist(self) -> Any:
            return self.cpu().tolist()

        def to(self, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Any:
            return self.as_subclass(torch.Tensor) if non_blocking else self.cpu()

    return torch.as_tensor(values).as_subclass(Device)


def _scheduler(recorder: Recorder, stack: KvStack, request: Any, loop: Loop) -> Any:
    import torch

    stock: Any = lookup.find("sglang.srt.managers.scheduler:Scheduler")
    from sglang.srt.disaggregation.utils import DisaggregationMode

    slots = stack.allocator.alloc(_CHUNKS * PAGE)
    launched: list[Any] = []

    class Scheduler(_Has, stock):  # type: ignore[misc]
        def get_new_batch_prefill(self, *args: Any) -> Any:
            number = len(launched) + 1
            if number > _CHUNKS:
                raise _Ended
            request.prefix_indices = slots[: (number - 1) * PAGE]
            request.prefix_len = (number - 1) * PAGE
            request.fill_ids = [0] * (number * PAGE)
            request.fill_len = number * PAGE
            request.extend_end = number * PAGE
            request.extend_range = _Has(start=(number - 1) * PAGE, end=number * PAGE)
            self.chunked_req = request
            batch = _batch(request, number)
            launched.append(batch)
            return _Has(batch_to_run=batch, running_batch=self.running_batch) if args else batch

        def on_idle(self) -> None:
            raise lookup.Moved(f"the loop {loop.name} takes no batch")

        def process_batch_result(self, batch: Any, result: Any, *_args: Any) -> None:
            self.process_batch_result_disagg_prefill(batch, result)

        def maybe_prepare_mlp_sync_batch(self, batch: Any) -> Any:
            return batch

        def _pp_prepare_tensor_dict(self, *_args: Any) -> dict[str, Any]:
            return {}

        def _pp_prep_batch_result(self, *_args: Any) -> Any:
            return _result(torch.as_tensor([0]))

        def _forward_isolation(self, *_args: Any, **_more: Any) -> Any:
            return _ABSENT

        def check_bootstrap(self, _req: Any) -> bool:
            return True

    for name in _NO_REQUESTS:
        setattr(Scheduler, name, lambda *_, **__: [])
    for name in _NO_AGREEMENT:
        setattr(Scheduler, name, lambda *_, **__: ([], []))

    def forward(batch: Any, **_more: Any) -> Any:
        written = slots[(batch.number - 1) * PAGE : batch.number * PAGE]
        recorder.kernel("forward writes a chunk", writes=stack.kv_pages(written))
        return _result(_device([0]))

    copies = Stream(name="copies")
    table = torch.zeros((1, len(slots)), dtype=torch.int64)
    table[0] = slots
    return Scheduler(
        is_generation=True,
        chunked_req=None,
        last_batch=None,
        forward_sleep_time=None,
        batch_record_buf=[None, None],
        ngram_embedding_manager=_Has(prepare_for_forward=lambda batch, **_: batch),
        dp_attn_adapter=_Has(maybe_prepare_mlp_sync_batch=lambda batch: batch),
        enable_overlap=loop is OVERLAP,
        pp_size=loop.pp_size,
        ps=_Has(pp_size=loop.pp_size, pp_rank=loop.rank),
        pp_group=_Has(
            is_first_rank=not loop.last,
            is_last_rank=loop.last,
            recv_tensor_dict=lambda *_, **__: {"__msg_type__": "output"},
        ),
        server_args=_Has(pp_async_batch_depth=loop.ahead),
        pp_comm_stream_ctx=_ABSENT,
        copy_stream=copies,
        copy_stream_ctx=copies,
        disaggregation_mode=DisaggregationMode.PREFILL,
        schedule_stream=stack.schedule,
        forward_stream=stack.forward,
        forward_stream_ctx=stack.forward,
        device_module=torch.cuda,
        spec_algorithm=_Has(is_none=lambda: True),
        model_worker=_Has(forward_batch_generation=forward),
        token_to_kv_pool_allocator=_Has(
            page_size=PAGE, translate_kv_indices_for_transfer=lambda indices: indices
        ),
        req_to_token_pool=_Has(req_to_token=_device(table)),
        running_batch=_Has(),
        waiting_queue=[],
        disagg_prefill_inflight_queue=[],
    )


def _result(ids: Any) -> Any:
    """What a forward, or a later stage of the pipeline, gives back."""
    from sglang.srt.managers.utils import GenerationBatchResult

    result = lookup.call(
        GenerationBatchResult, logits_output=_Has(hidden_states=None), next_token_ids=ids
    )
    result.pp_hidden_states_proxy_tensors = _Has(tensors={})
    return result


def _request(recorder: Recorder, stack: KvStack, backend: str, sent: set[int]) -> Any:
    """A request whose sender is the backend's own. `sent` gets the pages that are read of it."""

    def send(page_indices: Any, **more: Any) -> None:
        slots = (_slots(int(page)) for page in page_indices)
        pages = set().union(*(stack.kv_pages(some) for some in slots))

        def read() -> None:
            # A release may read in the scheduler's thread; no stream orders that either.
            nic = threads[0] if threads else Stream(name="RDMA read")
            sent.update(map(int, page_indices))
            recorder.kernel("RDMA read of a chunk", reads=pages, stream=nic)

        threads: list[Stream] = []
        transfer = Transfer(backend, read)
        transfer.sender._early_send_wait_event = sender._early_send_wait_event
        sender._early_send_wait_event = None
        transfer.send(**more)
        with recorder.thread("RDMA read") as thread:
            threads.append(thread)
            transfer.work()

    class Sender(type(Transfer(backend, look=lambda: None).sender)):  # type: ignore[misc]
        def send(self, page_indices: Any, _state: Any = None, **more: Any) -> None:
            send(page_indices, **more)

        def should_send_kv_chunk(self, *_args: Any) -> bool:
            return True

        def get_max_transfer_tokens(self) -> None: ...

    sender = Sender(
        _early_send_wait_event=None, kv_mgr=_Has(enable_all_cp_ranks_for_transfer=False)
    )
    return _Has(
        disagg_kv_sender=sender,
        origin_input_ids=[0] * ((_CHUNKS + 1) * PAGE),
        start_send_idx=0,
        disagg_decode_prefix_len=0,
        host_hit_length=0,
        req_pool_idx=0,
        kv=_Has(req_pool_idx=0),
        is_chunked=1,
        inflight_middle_chunks=1,
        discard_output_reason=None,
    )


def _slots(page: int) -> Any:
    import torch

    return torch.arange(page * PAGE, (page + 1) * PAGE)


def _batch(request: Any, number: int) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    request.is_chunked += 1
    request.inflight_middle_chunks += 1
    batch: Any = _Has(
        number=number,
        reqs=[request],
        forward_mode=ForwardMode.EXTEND,
        spec_algorithm=_Has(is_none=lambda: True),
        hicache_consumer_index=-1,
        req_pool_indices=_device([0]),
        seq_lens=_device([0]),
        seq_lens_cpu=None,
        chunked_req=None,
        spec_info=None,
        prefill_input_ids_cpu=None,
        mix_running_indices=None,
        batch_size=lambda: 1,
    )
    batch.copy = lambda: batch
    batch.get_model_worker_batch = lambda *_args: batch
    return batch


HAZARDS = (
    *(
        Hazard(
            f"middle-chunk-before-write-{backend}",
            f"is a chunk sent over {backend} only once the forward that writes it has ended?",
            chunks([backend], [OVERLAP, NORMAL]),
        )
        for backend in BACKENDS
    ),
    Hazard(
        "middle-chunk-before-write-pp",
        "is it so in a pipeline stage, the first and the last, with micro-batches ahead or not?",
        chunks(BACKENDS, PIPELINE),
    ),
)
