"""The early send of a cached prefix, held back or made to wait until its pages are written.

A prefill server may send a prefix that it found in its cache before it runs the forward for
the rest. The pages can still be written: by the previous forward, or by a load started for
the same batch. Stock records an event for the first; a backend must wait for it in its worker
thread, since no stream orders an RDMA read. NIXL drops the event: here it travels with the
chunk. A backend of a release that cannot wait sends nothing early, and neither does a batch
with a load under way: the ordinary send after the forward covers these pages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from sglang_scaling_fixes.attach import wrap
from sglang_scaling_fixes.early_send_ordering import points
from sglang_scaling_fixes.passthrough import Passthrough

MIXIN = points.MIXIN
EARLY_SEND = points.EARLY_SEND.target
RUN_BATCH = points.RUN_BATCH.target
PACKAGE = "sglang.srt.disaggregation"

_LOADING = "sglang_scaling_fixes_loading"
"""Attribute of a scheduler: the batch that it runs has a load under way."""
_EVENT = "sglang_scaling_fixes_wait_event"
"""Attribute of a chunk: the event to wait for before its pages are read."""


class _Sending(threading.local):
    """The event of the send that this thread is in."""

    event: Any = None


_sending = _Sending()


def run_batch(
    stock: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Remember, while a batch is run, whether a load was started for it."""
    setattr(scheduler, _LOADING, getattr(batch, "hicache_consumer_index", -1) >= 0)
    return stock(scheduler, batch, *args, **kwargs)


def attach_hold_back(*, loading: bool, deaf: Iterable[str]) -> None:
    """Send nothing early while a load is under way (`loading`), nor through `deaf` backends.

    `deaf` are prefixes of modules whose senders do not wait for the event.
    """
    deaf = tuple(deaf)

    def maybe_send(
        stock: Callable[..., Any], scheduler: Any, req: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if loading and getattr(scheduler, _LOADING, False):
            return None
        modules = [cls.__module__ for cls in type(req.disagg_kv_sender).__mro__]
        if getattr(scheduler, "enable_overlap", True) and any(
            module.startswith(deaf) for module in modules
        ):
            return None
        return stock(scheduler, req, *args, **kwargs)

    wrap(points.EARLY_SEND, maybe_send)
    if loading:
        wrap(points.RUN_BATCH, run_batch)


def attach_nixl() -> None:
    """Carry the event with the chunk, and wait for it where NIXL takes the chunk up."""

    def send(stock: Callable[..., Any], sender: Any, *args: Any, **kwargs: Any) -> Any:
        # Releases up to 0.5.22 leave the event on the sender; it belongs to this chunk.
        _sending.event = getattr(sender, "_early_send_wait_event", None)
        try:
            return stock(sender, *args, **kwargs)
        finally:
            _sending.event = None
            sender._early_send_wait_event = None

    def add_transfer_request(
        stock: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
    ) -> Any:
        event = kwargs.get("wait_event") or _sending.event
        if event is None:
            return stock(manager, *args, **kwargs)
        queues = manager.transfer_queues
        manager.transfer_queues = [_Marking(queue, event) for queue in queues]
        try:
            return stock(manager, *args, **kwargs)
        finally:
            manager.transfer_queues = queues

    def transfer_worker(
        stock: Callable[..., Any], manager: Any, queue: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return stock(manager, _Waiting(queue), *args, **kwargs)

    wrap(points.NIXL_SEND, send)
    wrap(points.NIXL_ADD_REQUEST, add_transfer_request)
    wrap(points.NIXL_WORKER, transfer_worker)


class _Marking(Passthrough):
    """A transfer queue that puts an event on every chunk. Used by the one thread that sends,
    during one send."""

    def __init__(self, stock: Any, event: Any) -> None:
        super().__init__(stock)
        self._event = event

    def put(self, chunk: Any) -> None:
        setattr(chunk, _EVENT, self._event)
        self._stock.put(chunk)


class _Waiting(Passthrough):
    """A transfer queue that gives a chunk out once its event has happened. Waits in the worker
    thread."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        chunk = self._stock.get(*args, **kwargs)
        if (event := getattr(chunk, _EVENT, None)) is not None:
            event.synchronize()
            setattr(chunk, _EVENT, None)
        return chunk
