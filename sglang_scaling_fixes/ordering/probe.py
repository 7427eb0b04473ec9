"""Is this release ordered? Asked of its own classes, before and after attaching.

Nothing here reads a version number, touches a GPU or starts a thread: the release's methods
run on bare objects whose streams, events and counters notice who waits for them before the
work begins.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_scaling_fixes.attach import is_wrapped, resolve
from sglang_scaling_fixes.ordering import early_send, loads, statements
from sglang_scaling_fixes.ordering.statements import Lenient
from sglang_scaling_fixes.ordering.transfer import Transfer


def exists(module: str) -> bool:
    """Whether this release has the module. One that cannot be imported exists."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def own_method(target: str, method: str) -> bool:
    """Whether this release has the class, with a method of its own by this name.

    Raises `AttachError` if the module is there and the class is not to be had.
    """
    module, _, name = target.partition(":")
    if not exists(module):
        return False
    cls = resolve(target)[2]
    assert cls.__name__ == name
    return method in vars(cls)


class _Started(Exception):
    """The copy was started."""


class _Any:
    """Any attribute, any call, any context: itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_args: Any) -> None: ...


def fenced(target: str, method: str) -> bool:
    """Does `method` of the controller at `target` wait for the forward stream before it copies?

    The stream is handed over as the release's scheduler does, and as our `bind` does.
    """
    cls: Any = resolve(f"{target}.{method}")[0]
    forward = object()
    waited: list[Any] = []

    class Copies(_Any):
        def wait_stream(self, stream: Any) -> None:
            waited.append(stream)

        def start(self, *_args: Any, **_kwargs: Any) -> Any:
            raise _Started

        __enter__ = submit_host_to_device = submit_device_to_host = start

    class Bare(Lenient, cls):  # type: ignore[misc]
        def _indices(self, *_args: Any, **_kwargs: Any) -> Any:
            return _Any(), _Any(), None

        move_indices = _move_op_indices = _move_write_operation = move_hybrid_indices = _indices

    copies = Copies()
    vars(copies).update(host_to_device_stream=copies, device_to_host_stream=copies)
    controller: Any = Bare(
        load_queue=[_Any()],
        write_queue=[_Any()],
        layer_done_counter=SimpleNamespace(update_producer=lambda: 0, events=[_Any()]),
        load_stream=copies,
        write_stream=copies,
    )
    if own_method("sglang.srt.mem_cache.l2_transfer:L2TransferEngine", "submit_host_to_device"):
        controller.l2_transfer_engine = copies
    statements.hand_over_streams(controller, forward)
    if is_wrapped(f"{target}.{method}"):
        loads.bind(controller, forward)
    streams = SimpleNamespace(Event=_Any, stream=lambda stream: stream)
    module = importlib.import_module(cls.__module__)
    # Whatever a bare object lacks ends the call as well: what counts is who was waited for.
    with (
        mock.patch.object(module, "device_module", streams, create=True),
        contextlib.suppress(Exception),
    ):
        getattr(controller, method)()
    return waited == [forward]


def prefetch_waits() -> bool:
    """Does the broadcast of a layer wait for the load of that layer, on either communicator?"""
    cls: Any = resolve(loads.PREFETCH)[0]
    from sglang.srt.managers.cache_controller import LayerDoneCounter

    waited: list[int] = []

    class Counter(LayerDoneCounter):  # type: ignore[misc]
        def wait_until(self, threshold: int) -> None:
            waited.append(threshold)

    in_time: list[bool] = []
    for communicator in (_Any(), None):

        class Bare(Lenient, cls):  # type: ignore[misc]
            def _is_layer_owned(self, _layer_id: int) -> bool:
                return True

            def _broadcast_tensor_from_owner(self, *_args: Any, **_kwargs: Any) -> None:
                in_time.append(waited == [3])

        waited.clear()
        Bare(
            start_layer=4,
            kv_buffer=[None] * 8,
            layer_broadcast_comm=communicator,
            layer_transfer_counter=Counter.__new__(Counter),
            kv_broadcast_stream=_Any(),
            device_module=_Any(),
        ).prefetch_kv_buffer(7)
    return in_time == [True, True]


# -- early send -------------------------------------------------------------------------


def sends_early() -> bool:
    """Whether this release sends cached prefixes early at all."""
    return own_method(*early_send.EARLY_SEND.rsplit(".", 1))


def records_event() -> bool:
    """Whether an early send comes with an event that the previous forward has ended."""
    sender = Lenient()
    with mock.patch("torch.cuda.Event", _Any):
        statements.send_early(prefill_scheduler(lambda _req: None), batch(sender, loading=False))
    return sender._early_send_wait_event is not None


def waits_for_event(backend: str) -> bool:
    """Is the event of the previous forward recorded, and waited for before `backend` transfers?"""
    waited: list[bool] = []
    begun: list[bool] = []

    class Event:
        def record(self, *_args: Any) -> None: ...

        def synchronize(self) -> None:
            waited.append(True)

    transfer = Transfer(backend, look=lambda: begun.append(bool(waited)))
    with mock.patch("torch.cuda.Event", Event):
        scheduler = prefill_scheduler(lambda _req: transfer.send())
        statements.send_early(scheduler, batch(transfer.sender, loading=False))
    if not begun and not transfer.queued:
        return True  # held back: nothing is sent early
    transfer.work()
    return begun == [True]


def holds_back_loads() -> bool:
    """Is nothing sent early while a load for the same batch is under way?"""
    sent: list[Any] = []
    scheduler = prefill_scheduler(sent.append)
    with mock.patch("torch.cuda.Event", _Any):
        run_early_sends(scheduler, batch(Lenient(), loading=True))
    return not sent


def run_early_sends(scheduler: Any, running: Any) -> None:
    """The early sends of `Scheduler.run_batch`, through our wrapper where there is one."""
    if is_wrapped(early_send.RUN_BATCH):
        early_send.run_batch(statements.send_early, scheduler, running)
    else:
        statements.send_early(scheduler, running)


def prefill_scheduler(send: Any, forward: Any = None, page_size: int = 1) -> Any:
    """As much of a prefill scheduler as an early send asks for, with its own method."""
    mixin: Any = resolve(early_send.EARLY_SEND)[0]
    from sglang.srt.disaggregation.utils import DisaggregationMode

    class Scheduler(Lenient, mixin):  # type: ignore[misc]
        def send_kv_chunk(self, req: Any, **_kwargs: Any) -> None:
            send(req)

    return Scheduler(
        enable_overlap=True,
        enable_staging=False,
        disaggregation_mode=DisaggregationMode.PREFILL,
        forward_stream=forward,
        token_to_kv_pool_allocator=Lenient(page_size=page_size),
    )


def batch(sender: Any, *, loading: bool, prefix: int = 64) -> Any:
    """A batch of one request whose cached prefix of `prefix` tokens could be sent early."""
    request = Lenient(
        pending_bootstrap=False,
        prefix_indices=range(prefix),
        prefix_len=prefix,
        host_hit_length=0,
        start_send_idx=0,
        disagg_kv_sender=sender,
    )
    return Lenient(reqs=[request], hicache_consumer_index=0 if loading else -1)
