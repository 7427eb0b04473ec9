"""Where the prefill side is called from: stock's methods, wrapped.

They do nothing until a prefill KV manager starts in this process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import is_there, replace, wrap
from sglang_scaling_fixes.kv_poll import FAILED, TRANSFERRING
from sglang_scaling_fixes.reclaim import points
from sglang_scaling_fixes.reclaim.prefill.interposers import StatusInterposer
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide


def attach() -> None:
    """Wrap every prefill-side attach point."""
    _attach_manager()
    _attach_sender()


def _attach_manager() -> None:
    def init_engine(stock: Callable[..., Any], manager: Any) -> Any:
        result = stock(manager)
        if manager.disaggregation_mode.value == "prefill":
            PrefillSide(manager).install()
        return result

    def start_prefill_thread(stock: Callable[..., Any], manager: Any) -> Any:
        if (side := PrefillSide.current) is not None:
            side.tap_socket()
        return stock(manager)

    def transfer_worker(
        stock: Callable[..., Any], manager: Any, queue: Any, executor: Any, *args: Any, **kw: Any
    ) -> Any:
        if (side := PrefillSide.current) is None:
            return stock(manager, queue, executor, *args, **kw)
        return side.work(stock, manager, queue, executor, *args, **kw)

    def connect(stock: Callable[..., Any]) -> Callable[..., Any]:
        def connected(manager: Any, to: str, *args: Any, **kwargs: Any) -> Any:
            side = PrefillSide.current
            if side is None:
                return stock(manager, to, *args, **kwargs)
            connect = functools.partial(stock, manager, to, *args, **kwargs)
            lock = side.sends.setdefault(to, threading.Lock())  # one step: by several threads
            return StatusInterposer(connect, to, side, lock)

        return connected

    wrap(points.INIT_ENGINE, init_engine)
    wrap(points.PREFILL_THREAD, start_prefill_thread)
    wrap(points.TRANSFER_WORKER, transfer_worker)
    replace(points.MANAGER_CONNECT, connect)


def _attach_sender() -> None:
    def sender_init(stock: Callable[..., Any]) -> Callable[..., Any]:
        def made(sender: Any, *args: Any, **kwargs: Any) -> None:
            stock(sender, *args, **kwargs)
            if PrefillSide.current is not None:
                PrefillSide.current.sender_made(sender)

        return made

    def send(stock: Callable[..., Any]) -> Callable[..., Any]:
        def sent(sender: Any, *args: Any, **kwargs: Any) -> Any:
            side = PrefillSide.current
            if side is None:
                return stock(sender, *args, **kwargs)
            return side.send(stock, sender, *args, **kwargs)

        return sent

    def send_kv_chunk(stock: Callable[..., Any]) -> Callable[..., Any]:
        def sent(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            if PrefillSide.current is not None:
                PrefillSide.current.computes(request)
            return stock(scheduler, request, *args, **kwargs)

        return sent

    def poll(stock: Callable[..., Any]) -> Callable[..., Any]:
        """Failed is not shown while a write of the room still reads its source pages.

        Stock frees a failed room's source pages at once; the next owner's KV would
        then be sent in their place.
        """

        def polled(sender: Any) -> Any:
            # Every sender in every turn of the loop.
            status = stock(sender)
            if status == FAILED and (side := PrefillSide.current) is not None:
                return type(status)(TRANSFERRING) if side.busy(sender) else status
            return status

        return polled

    def clear(stock: Callable[..., Any]) -> Callable[..., Any]:
        def cleared(sender: Any) -> Any:
            if (side := PrefillSide.current) is not None:
                side.ends.clearing(sender)
            result = stock(sender)
            if side is not None:
                side.retire(sender)
            return result

        return cleared

    replace(points.SENDER_INIT, sender_init)
    replace(points.SEND_CHUNK, send_kv_chunk)
    replace(points.SENDER_SEND, send)
    replace(points.SENDER_POLL, poll)
    replace(points.SENDER_CLEAR, clear)
    _attach_ends()


def _attach_ends() -> None:
    """Where a request ends on prefill other than by its sender being cleared."""

    def abort(stock: Callable[..., Any], sender: Any) -> Any:
        result = stock(sender)
        if PrefillSide.current is not None:
            PrefillSide.current.ends.stopped(sender)
        return result

    def add_request(
        stock: Callable[..., Any], scheduler: Any, req: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = stock(scheduler, req, *args, **kwargs)
        if PrefillSide.current is not None:
            PrefillSide.current.ends.admitted(req)
        return result

    def abort_request(stock: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if (side := PrefillSide.current) is None:
            return stock(scheduler, *args, **kwargs)
        before = list(scheduler.waiting_queue)
        result = stock(scheduler, *args, **kwargs)
        side.ends.left(before, scheduler.waiting_queue)
        return result

    def waiting_timeout(stock: Callable[..., Any]) -> Callable[..., Any]:
        def timed_out(scheduler: Any) -> None:
            # Every turn of the loop. Stock makes another list if it takes any request out.
            before = scheduler.waiting_queue
            stock(scheduler)
            if before is not scheduler.waiting_queue and PrefillSide.current is not None:
                PrefillSide.current.ends.left(before, scheduler.waiting_queue)

        return timed_out

    wrap(points.SENDER_ABORT, abort)
    wrap(points.ADD_REQUEST, add_request)
    wrap(points.ABORT_REQUEST, abort_request)
    if is_there(points.WAITING_TIMEOUT):
        replace(points.WAITING_TIMEOUT, waiting_timeout)
