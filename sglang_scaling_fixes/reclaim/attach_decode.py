"""Where the decode guard is called from: stock's methods, wrapped.

They do nothing until a decode KV manager starts in this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import wrap_method
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import layout
from sglang_scaling_fixes.reclaim.decode import DecodeGuard, OutgoingTap, rank_of

_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_DECODE = "sglang.srt.disaggregation.decode"
_QUEUE = f"{_DECODE}:DecodePreallocQueue"
_SCHEDULER = "sglang.srt.managers.scheduler"


def attach(config: Config) -> None:
    """Wrap every decode-side attach point."""
    _attach_manager(config)
    _attach_receiver()
    _attach_scheduler()


def _attach_manager(config: Config) -> None:
    def start_decode_thread(stock: Callable[..., Any], manager: Any) -> Any:
        DecodeGuard(manager, config)
        return stock(manager)

    def queue_init(stock: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
        DecodeGuard.current = None
        stock(queue, *args, **kwargs)
        if DecodeGuard.current is not None:
            DecodeGuard.current.install_gate(queue)

    wrap_method(f"{_MOONCAKE}:MooncakeKVManager.start_decode_thread", start_decode_thread)
    wrap_method(f"{_QUEUE}.__init__", queue_init)


def _attach_receiver() -> None:
    def connect(stock: Callable[..., Any], cls: Any, bootstrap_info: dict[str, Any]) -> Any:
        route = functools.partial(stock, cls, bootstrap_info)
        socket, lock = route()
        guard = DecodeGuard.current
        if guard is None:
            return socket, lock
        return OutgoingTap(socket, rank_of(bootstrap_info), route, guard), lock

    def send_metadata(stock: Callable[..., Any], receiver: Any, *args: Any, **kwargs: Any) -> Any:
        guard = DecodeGuard.current
        if guard is None:
            return stock(receiver, *args, **kwargs)
        return guard.send_metadata(stock, receiver, *args, **kwargs)

    def poll(stock: Callable[..., Any], receiver: Any) -> Any:
        guard = DecodeGuard.current
        return stock(receiver) if guard is None else guard.poll(stock, receiver)

    def clear(stock: Callable[..., Any], receiver: Any) -> Any:
        if (guard := DecodeGuard.current) is not None:
            guard.clearing(receiver)
        return stock(receiver)

    def commit(stock: Callable[..., Any], queue: Any, request: Any) -> Any:
        guard = DecodeGuard.current
        if guard is None:
            return stock(queue, request)
        with guard.committing(request.kv_receiver):
            return stock(queue, request)

    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver._connect_to_bootstrap_server", connect)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.send_metadata", send_metadata)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.poll", poll)
    wrap_method(f"{_MOONCAKE}:MooncakeKVReceiver.clear", clear)
    wrap_method(f"{_DECODE}:DecodeTransferQueue._commit_transfer_to_req", commit)


def _attach_scheduler() -> None:
    def add(
        stock: Callable[..., Any],
        queue: Any,
        req: Any,
        is_retracted: bool = False,
        is_rebootstrap: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Admission, before a request has anything. One that comes back is not refused."""
        guard = DecodeGuard.current
        back = is_retracted or is_rebootstrap
        if guard is not None and guard.refusing and not back and not layout.is_fake(req):
            return guard.refuse(queue, req)
        if is_rebootstrap:
            kwargs["is_rebootstrap"] = True
        return stock(queue, req, is_retracted, **kwargs)

    def process_input_requests(
        stock: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Every iteration of every loop, on all TP ranks alike, paused or not.
        if (guard := DecodeGuard.current) is not None:
            guard.tick()
        return stock(scheduler, *args, **kwargs)

    def is_fully_idle(
        stock: Callable[..., Any], scheduler: Any, for_health_check: bool = False, **kwargs: Any
    ) -> Any:
        idle = stock(scheduler, for_health_check, **kwargs)
        guard = DecodeGuard.current
        return idle and (for_health_check or guard is None or not guard.holding())

    wrap_method(f"{_QUEUE}.add", add)
    wrap_method(f"{_SCHEDULER}:Scheduler.process_input_requests", process_input_requests)
    wrap_method(f"{_SCHEDULER}:Scheduler.is_fully_idle", is_fully_idle)
