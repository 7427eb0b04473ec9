"""Where decode is called from: stock's methods, wrapped.

They do nothing until a decode KV manager starts in this process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.attach import present, replace, wrap
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.kv_poll import SUCCESS
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim import layout, points, retry_after
from sglang_scaling_fixes.reclaim.decode import fence, maintenance
from sglang_scaling_fixes.reclaim.decode.maintenance import Maintenance
from sglang_scaling_fixes.reclaim.decode.peers import OutgoingSocket, rank_of
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide


def attach(config: Config) -> None:
    """Wrap every decode-side attach point."""
    _attach_manager(config)
    _attach_receiver()
    _attach_scheduler()
    _attach_maintenance()


def _attach_manager(config: Config) -> None:
    def start_decode_thread(stock: Callable[..., Any], manager: Any) -> Any:
        DecodeSide(manager, config).install()
        return stock(manager)

    def queue_init(stock: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
        DecodeSide.current = None
        stock(queue, *args, **kwargs)
        side = DecodeSide.current
        if side is not None:
            side.install_gate(queue)
            group = TpGroup(layout.in_step(queue))
            side.maintenance = Maintenance(side.ledger, side.tick, queue.scheduler, group)

    def engine_init(stock: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> None:
        """What an engine opens, a fence must see closed."""
        before = fence.openings()
        stock(engine, *args, **kwargs)
        fence.record(engine, fence.openings() - before)

    def receiver_made(
        stock: Callable[..., Any], queue: Any, req: Any, *args: Any, **kw: Any
    ) -> Any:
        """Stock's receiver does not know its request, and so not how long the prompt is."""
        made = stock(queue, req, *args, **kw)
        if DecodeSide.current is not None and not layout.is_fake(req):
            DecodeSide.current.rooms.made(made.kv_receiver)
        made.kv_receiver.sglang_scaling_fixes_came = time.monotonic()
        made.kv_receiver.sglang_scaling_fixes_tokens = functools.partial(
            layout.prompt_tokens, queue, req
        )
        made.kv_receiver.sglang_scaling_fixes_prefill = layout.prefill_of(req)
        made.kv_receiver.sglang_scaling_fixes_rejected = functools.partial(
            layout.rejected, queue.kv_manager, req
        )
        made.kv_receiver.sglang_scaling_fixes_lock = functools.partial(
            layout.lock_prefix, queue, made
        )
        return made

    def fail_request(
        stock: Callable[..., Any], req: Any, error_message: str, status_code: Any = None
    ) -> Any:
        """Stock ends each failed transfer with 500. One that prefill ended may be tried again."""
        _, ended, after = error_message.partition(retry_after.ENDED)
        if ended:
            error_message, status_code = ended + after, HTTPStatus.SERVICE_UNAVAILABLE
        return stock(req, error_message, status_code=status_code)

    wrap(points.FAIL_REQUEST, fail_request)
    wrap(points.CREATE_RECEIVER, receiver_made)
    wrap(points.ENGINE_INIT, engine_init)
    wrap(points.DECODE_THREAD, start_decode_thread)
    wrap(points.QUEUE_INIT, queue_init)


def _attach_receiver() -> None:
    def connect(stock: Callable[..., Any]) -> Callable[..., Any]:
        def connected(cls: Any, bootstrap_info: dict[str, Any]) -> Any:
            socket, lock = stock(cls, bootstrap_info)
            side = DecodeSide.current
            if side is None:
                return socket, lock
            rank = rank_of(bootstrap_info)
            route = functools.partial(stock, cls, bootstrap_info)
            return OutgoingSocket(socket, rank, route, side.peers), lock

        return connected

    def send_metadata(stock: Callable[..., Any]) -> Callable[..., Any]:
        def sent(receiver: Any, *args: Any, **kwargs: Any) -> Any:
            side = DecodeSide.current
            if side is None:
                return stock(receiver, *args, **kwargs)
            return side.send_metadata(stock, receiver, *args, **kwargs)

        return sent

    def poll(stock: Callable[..., Any]) -> Callable[..., Any]:
        def polled(receiver: Any) -> Any:
            # Every receiver in every turn of the loop, and nearly always one that waits.
            status = stock(receiver)
            if status != SUCCESS or DecodeSide.current is None:
                return status
            return DecodeSide.current.rooms.succeeded(stock, receiver)

        return polled

    def clear(stock: Callable[..., Any]) -> Callable[..., Any]:
        def cleared(receiver: Any) -> Any:
            side = DecodeSide.current
            if side is None:
                return stock(receiver)
            side.clearing(receiver)
            return side.rooms.clear(stock, receiver)

        return cleared

    def commit(stock: Callable[..., Any]) -> Callable[..., Any]:
        def committed(queue: Any, request: Any) -> Any:
            side = DecodeSide.current
            return stock(queue, request) if side is None else side.commit(stock, queue, request)

        return committed

    replace(points.RECEIVER_CONNECT, connect)
    replace(points.SEND_METADATA, send_metadata)
    replace(points.RECEIVER_POLL, poll)
    replace(points.RECEIVER_CLEAR, clear)
    replace(points.COMMIT, commit)


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
        side = DecodeSide.current
        back = is_retracted or is_rebootstrap
        if side is not None and not back and not layout.is_fake(req) and side.refused(queue, req):
            return None
        if is_rebootstrap:
            kwargs["is_rebootstrap"] = True
        return stock(queue, req, is_retracted, **kwargs)

    def process_input_requests(stock: Callable[..., Any]) -> Callable[..., Any]:
        def processed(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            # Every iteration of every loop, on all TP ranks alike, paused or not.
            if DecodeSide.current is not None:
                DecodeSide.current.tick()
            return stock(scheduler, *args, **kwargs)

        return processed

    def resume_retracted(stock: Callable[..., Any]) -> Callable[..., Any]:
        def resumed(queue: Any, *args: Any, **kwargs: Any) -> Any:
            back = stock(queue, *args, **kwargs)
            if queue.retracted_queue and DecodeSide.current is not None:
                DecodeSide.current.relief.crowded_out = not (
                    back or queue.scheduler.running_batch.reqs or queue.scheduler.waiting_queue
                )
            return back

        return resumed

    def is_fully_idle(stock: Callable[..., Any]) -> Callable[..., Any]:
        def idle(scheduler: Any, for_health_check: bool = False, **kwargs: Any) -> Any:
            side = DecodeSide.current
            fully = stock(scheduler, for_health_check, **kwargs)
            return fully and (for_health_check or side is None or not side.holding())

        return idle

    wrap(points.QUEUE_ADD, add)
    replace(points.PROCESS_REQUESTS, process_input_requests)
    replace(points.FULLY_IDLE, is_fully_idle)
    replace(points.RESUME_RETRACTED, resume_retracted)


def _attach_maintenance() -> None:
    def asked(operation: Callable[..., Any]) -> Callable[..., Any]:
        def handled(stock: Callable[..., Any], owner: Any, request: Any) -> Any:
            side = DecodeSide.current
            if side is None or side.maintenance is None:
                return stock(owner, request)
            return operation(side.maintenance, stock, owner, request)

        return handled

    wrap(present(points.RELEASE_MEMORY), asked(Maintenance.release))
    wrap(present(points.RESUME_MEMORY), asked(Maintenance.resume))
    for update in points.UPDATE_WEIGHTS:
        wrap(present(update), asked(Maintenance.update))
    wrap(present(points.FLUSH), asked(Maintenance.flush))
    wrap(points.ATTACH_STORAGE, asked(Maintenance.storage))
    wrap(points.DETACH_STORAGE, asked(Maintenance.storage))
    wrap(present(points.ANSWERS), maintenance.answers)
