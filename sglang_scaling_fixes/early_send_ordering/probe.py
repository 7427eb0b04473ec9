"""Does this release's early send of a cached prefix wait until its pages are written?

Asked of its own classes, as they run on bare objects. Nothing here reads a version number,
touches a GPU or starts a thread.
"""

from __future__ import annotations

import ast
from typing import Any
from unittest import mock

from sglang_scaling_fixes import scheduler_statements
from sglang_scaling_fixes.attach import is_wrapped, resolve
from sglang_scaling_fixes.early_send_ordering import sends
from sglang_scaling_fixes.early_send_ordering.transfer import Transfer
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.presence import own_method
from sglang_scaling_fixes.standin_objects import Anything, Lenient


def sends_early() -> bool:
    """Whether this release sends cached prefixes early at all."""
    return own_method(*sends.EARLY_SEND.rsplit(".", 1))


def records_event() -> bool:
    """Whether an early send comes with an event that the previous forward has ended."""
    sender = Lenient()
    with mock.patch("torch.cuda.Event", Anything):
        send_early(prefill_scheduler(lambda _req: None), batch(sender, loading=False))
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
        send_early(scheduler, batch(transfer.sender, loading=False))
    if not begun and not transfer.queued:
        return True  # held back: nothing is sent early
    transfer.work()
    return begun == [True]


def holds_back_loads() -> bool:
    """Is nothing sent early while a load for the same batch is under way?"""
    sent: list[Any] = []
    scheduler = prefill_scheduler(sent.append)
    with mock.patch("torch.cuda.Event", Anything):
        run_early_sends(scheduler, batch(Lenient(), loading=True))
    return not sent


def send_early(scheduler: Any, batch: Any) -> None:
    """The part of `Scheduler.run_batch` that sends cached prefixes early.

    Raises `AttachError` where it is gone.
    """
    if not scheduler_statements.run(_sends_early, self=scheduler, batch=batch):
        raise AttachError(
            f"expected a call of {_METHOD} in {scheduler_statements.SCHEDULER}:Scheduler.run_batch"
        )


_METHOD = sends.EARLY_SEND.rpartition(".")[2]


def _sends_early(node: ast.If) -> bool:
    return any(
        isinstance(child, ast.Call)
        and isinstance(child.func, ast.Attribute)
        and child.func.attr == _METHOD
        for child in ast.walk(node)
    )


def run_early_sends(scheduler: Any, running: Any) -> None:
    """The early sends of `Scheduler.run_batch`, through our wrapper where there is one."""
    if is_wrapped(sends.RUN_BATCH):
        sends.run_batch(send_early, scheduler, running)
    else:
        send_early(scheduler, running)


def prefill_scheduler(send: Any, forward: Any = None, page_size: int = 1) -> Any:
    """As much of a prefill scheduler as an early send asks for, with its own method."""
    mixin: Any = resolve(sends.EARLY_SEND)[0]
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
