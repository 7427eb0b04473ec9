"""How a request ends on prefill, played by a release's own code. A script: see test_endings.py.

Each case gives stock's scheduler and sender a request whose destinations have come, or come later,
and lets stock end it. Prints for each case what decode was told, once as we are and once with the
telling taken out.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import FIX, messages, probe
from sglang_scaling_fixes.reclaim.prefill.ends import RequestEnds
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.retry_after import ENDED
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.standin_objects import Anything, Lenient

FIX.arm(Config())

from sglang.srt.disaggregation import decode  # noqa: E402
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender  # noqa: E402
from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue  # noqa: E402
from sglang.srt.disaggregation.utils import DisaggregationMode  # noqa: E402
from sglang.srt.managers.io_struct import AbortReq  # noqa: E402
from sglang.srt.managers.schedule_batch import FINISH_ABORT  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402

DECODE, RANK, ROOM = "tcp://192.0.2.2:9", "192.0.2.1:9", 77
WAITING, SUCCESS = 2, 4
PARALLEL = SimpleNamespace(pp_size=1, tp_rank=0, pp_rank=0, num_dp_ranks=1)


class PlayedScheduler(Lenient, Scheduler):
    """Stock's, never constructed."""


class PlayedSender(Lenient, MooncakeKVSender):
    """Stock's, never constructed."""


class PlayedQueue(Lenient, PrefillBootstrapQueue):
    """Stock's, never constructed."""


class Rejects(PlayedQueue):
    """It takes no prompt of two tokens."""

    max_total_num_tokens = max_input_len = 1


class Request(Lenient):
    def finished(self) -> bool:
        return self.finished_reason is not None


class Stock:
    """A prefill process: stock's objects, and what it says to decode."""

    def __init__(self) -> None:
        self.manager = probe._manager(engine=probe._Engine(), transfer_queues=[probe._Queue()])
        vars(self.manager).update(
            bootstrap_timeout=0.0, _deferred_ack_targets={}, _deferred_ack_poisoned_rooms=set()
        )
        self.side = PrefillSide(self.manager).install()
        self.side.tap_socket()
        self.said: list[Any] = []
        self.side._replies.send = self._send  # type: ignore[method-assign]
        self.scheduler = bare(PlayedScheduler)
        free, anything = SimpleNamespace(available_size=lambda: 8, alloc=lambda: 0), Anything()
        queue = bare(PlayedQueue, queue=[], scheduler=self.scheduler, kv_manager=self.manager)
        vars(self.scheduler).update(
            waiting_queue=[],
            disaggregation_mode=DisaggregationMode.PREFILL,
            disagg_prefill_bootstrap_queue=queue,
            disagg_prefill_inflight_queue=[],
            disagg_prefill_pending_chunk_rids=set(),
            req_to_metadata_buffer_idx_allocator=free,
            running_batch=SimpleNamespace(reqs=[], is_empty=lambda: True),
            model_config=SimpleNamespace(num_key_value_heads=1),
            _prefetch_kvcache=lambda request: None,
            collect_inflight_reqs=list,
            tree_cache=SimpleNamespace(
                supports_mamba=lambda: False,
                finish=lambda *_: None,
                release_aborted_request=lambda *_: None,
            ),
            ps=PARALLEL,
            enable_hicache_storage=False,
            **dict.fromkeys(
                (
                    *("grammar_manager", "send_to_tokenizer", "ipc_channels", "beam_coordinator"),
                    *("output_streamer", "stream_output", "metrics_reporter"),
                ),
                anything,
            ),
        )

    def bind(self, lease: str = "g1", waited: float | None = 0.0) -> None:
        """Decode's destinations come."""
        stock = [str(ROOM).encode(), *[b""] * 6, b"1"]
        bind = messages.Bind(DECODE, RANK, lease, lease, waited=waited)
        self.manager.server_socket.read(messages.attach_trailer(stock, bind))

    def request(self, **attributes: Any) -> Request:
        """A request that stock has made a sender for."""
        sender = bare(
            PlayedSender,
            kv_mgr=self.manager,
            bootstrap_room=ROOM,
            trace_ctx=Anything(),
            init_time=0.0,
            _owns_bootstrap_room=True,
        )
        self.manager.request_status[ROOM] = WAITING
        self.side.sender_made(sender)
        return made_request(disagg_kv_sender=sender, **attributes)

    def abort(self) -> None:
        self.scheduler.abort_request(AbortReq(rid="r"))

    def _send(self, to: str, frame: bytes) -> bool:
        self.said.append(messages.decode(frame))
        return True

    def told(self) -> list[str]:
        return [m.verdict for m in self.said if isinstance(m, messages.AttemptEnded)]


def bare(kind: type, **attributes: Any) -> Any:
    made: Any = object.__new__(kind)
    vars(made).update(attributes)
    return made


def made_request(**attributes: Any) -> Request:
    time_stats = bare(Anything, wait_queue_entry_time=1e-9)
    kv = SimpleNamespace(holds_kv=False, holds_mamba=False)
    return Request(
        **{
            "rid": "r",
            "bootstrap_room": ROOM,
            "origin_input_ids": [1, 2],
            "output_ids": [],
            "weight_version_events": [],
            "metadata_buffer_index": -1,
            "time_stats": time_stats,
            "kv": kv,
            "pending_bootstrap": False,
            "is_retracted": False,
            "bootstrap_host": "192.0.2.1",
            "release_mm_inputs_on_abort": Anything(),
            **attributes,
        }
    )


# -- the cases ---------------------------------------------------------------------------------


def aborted_in_the_bootstrap_queue(stock: Stock) -> None:
    stock.bind()
    stock.scheduler.disagg_prefill_bootstrap_queue.queue.append(stock.request())
    stock.abort()


def aborted_in_the_waiting_queue(stock: Stock) -> None:
    stock.bind()
    stock.scheduler.waiting_queue.append(stock.request())
    stock.abort()
    assert not stock.scheduler.waiting_queue


def aborted_in_the_inflight_queue(stock: Stock) -> None:
    stock.bind()
    stock.scheduler.disagg_prefill_inflight_queue.append(stock.request())
    stock.abort()


def aborted_between_two_chunks(stock: Stock) -> None:
    """Up to 0.5.13 stock has no such abort: the request is sent to its end."""
    stock.bind()
    request = stock.request()
    stock.scheduler.chunked_req = request
    stock.abort()
    if hasattr(Scheduler, "process_pending_chunked_abort"):
        stock.scheduler.process_pending_chunked_abort()
    else:
        request.disagg_kv_sender.abort()


def waited_too_long_in_the_waiting_queue(stock: Stock) -> None:
    """Later releases abort such a request."""
    stock.bind()
    stock.scheduler.waiting_queue = [stock.request()]
    if not hasattr(Scheduler, "_abort_on_waiting_timeout"):
        stock.abort()
        return
    from sglang.srt.environ import envs

    with envs.SGLANG_REQ_WAITING_TIMEOUT.override(1e-9):
        stock.scheduler._abort_on_waiting_timeout()
    assert not stock.scheduler.waiting_queue


def failed_in_stock(stock: Stock) -> None:
    stock.bind()
    sender = stock.request().disagg_kv_sender
    stock.manager.record_failure(ROOM, "lost its session")
    stock.manager.update_status(ROOM, 0)
    with contextlib.suppress(Exception):
        sender.failure_exception()


def timed_out_before_its_destinations(stock: Stock) -> None:
    sender = stock.request().disagg_kv_sender
    stock.manager.request_status[ROOM] = 1
    assert sender.poll() == 0
    with contextlib.suppress(Exception):
        sender.failure_exception()
    stock.bind()


def aborted_before_its_destinations(stock: Stock) -> None:
    stock.scheduler.disagg_prefill_bootstrap_queue.queue.append(stock.request())
    stock.abort()
    stock.bind()


def rejected(stock: Stock) -> None:
    """Longer than the pool: stock makes no sender."""
    stock.bind()
    queue = bare(Rejects, queue=[], scheduler=stock.scheduler, kv_manager=stock.manager)
    stock.scheduler.disagg_prefill_bootstrap_queue = queue
    request = made_request()
    stock.scheduler._add_request_to_queue(request)
    assert isinstance(request.finished_reason, FINISH_ABORT) and not queue.queue


def rejected_before_its_destinations(stock: Stock) -> None:
    queue = bare(Rejects, queue=[], scheduler=stock.scheduler, kv_manager=stock.manager)
    stock.scheduler.disagg_prefill_bootstrap_queue = queue
    stock.scheduler._add_request_to_queue(made_request())
    stock.bind()


def ended_well(stock: Stock) -> None:
    stock.bind()
    sender = stock.request().disagg_kv_sender
    attempt = stock.side._ledger.attempt_of("g1")
    assert attempt is not None and stock.side.success_leaves(DECODE, attempt)
    stock.manager.request_status[ROOM] = SUCCESS
    sender.clear()


def of_an_older_decode(stock: Stock) -> None:
    stock.bind(waited=None)
    stock.scheduler.disagg_prefill_inflight_queue.append(stock.request())
    stock.abort()


def a_newer_request_came(stock: Stock) -> None:
    """The destinations are the newer one's."""
    aborted = stock.request()
    aborted.disagg_kv_sender.abort()
    stock.request()
    stock.bind()


def a_newer_request_may_come(stock: Stock) -> None:
    """It came to decode long after the one that was aborted here: perhaps it is another."""
    with mock.patch("sglang_scaling_fixes.reclaim.prefill.ends.time.monotonic", lambda: -100.0):
        stock.request().disagg_kv_sender.abort()
    stock.bind()


CASES: tuple[Callable[[Stock], None], ...] = (
    aborted_in_the_bootstrap_queue,
    aborted_in_the_waiting_queue,
    aborted_in_the_inflight_queue,
    aborted_between_two_chunks,
    waited_too_long_in_the_waiting_queue,
    failed_in_stock,
    timed_out_before_its_destinations,
    aborted_before_its_destinations,
    rejected,
    rejected_before_its_destinations,
    ended_well,
    of_an_older_decode,
    a_newer_request_came,
    a_newer_request_may_come,
)


@contextlib.contextmanager
def around() -> Iterator[None]:
    """What releases ask of their process's arguments, and do with KV, of which there is none."""
    given: dict[str, Callable[..., Any]] = {
        "get_parallel": lambda: PARALLEL,
        "get_disagg": Lenient,
        "get_serving": Lenient,
        "release_kv_cache": lambda *_, **__: None,
    }
    with contextlib.ExitStack() as stack:
        for name in ("managers.scheduler", "disaggregation.prefill", "disaggregation.common.conn"):
            module = importlib.import_module(f"sglang.srt.{name}")
            for function, stand_in in given.items():
                if hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, stand_in))
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The telling taken out: what prefill ends by itself, it keeps to itself."""
    nothing = lambda *_: None  # noqa: E731
    with (
        mock.patch.object(RequestEnds, "stopped", nothing),
        mock.patch.object(RequestEnds, "admitted", nothing),
        mock.patch.object(Attempt, "bind", without_listening(Attempt.bind)),
    ):
        yield


def without_listening(bind: Callable[..., None]) -> Callable[..., None]:
    return lambda attempt, *args, listens=False: bind(attempt, *args, listens=False)


def played(case: Callable[[Stock], None]) -> list[str]:
    stock = Stock()
    case(stock)
    return stock.told()


def answered(reason: str) -> tuple[int, str]:
    """Status and message of a transfer that failed on decode, as stock words and ends it."""
    request = made_request(return_logprob=False)
    words = f"Decode transfer failed for request r with exception {reason}"
    decode.prepare_abort(request, words, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
    return int(request.finished_reason.status_code), request.finished_reason.message


with around():
    told = {case.__name__: played(case) for case in CASES}
    with silent():
        untold = {case.__name__: played(case) for case in CASES}
answers = [answered(reason) for reason in (f"KVTransferError: {ENDED} (aborted)", "lost")]
print("told:" + json.dumps({"told": told, "untold": untold, "answers": answers}))
