"""Prefill side: what is being written, what may no longer be, and when nothing is left.

One `PrefillGuard` per scheduler process, created with the KV manager's engine.
Three kinds of threads meet here, so every ledger call is made under one lock:

    receive thread   ReceiveTap: Bind (destinations arrive), Ask (an owner gave up)
    workers          QueueTap, ExecutorTap, EngineTap: chunks begin, end, fail
    scheduler        QueueTap.put: a chunk is queued; sender.clear: a room is forgotten
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import wrap_method
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.ledger import (
    Action,
    Attempt,
    Delivery,
    FailRoom,
    PrefillLedger,
    SendAnswer,
)
from sglang_scaling_fixes.reclaim.taps import EngineTap, ExecutorTap, QueueTap, ReceiveTap
from sglang_scaling_fixes.reclaim.transport import ReplySockets, new_incarnation

logger = logging.getLogger(__name__)

_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_FAILED, _TRANSFERRING = 0, 3
"""KVPoll values in every supported release (contract-tested)."""


class PrefillGuard:
    """Safe reclaim of one prefill rank."""

    current: PrefillGuard | None = None
    """The guard of this process: SGLang makes one KV manager per scheduler process."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._ledger = PrefillLedger(new_incarnation())
        self._replies = ReplySockets()
        self._deferred: deque[tuple[list[bytes], messages.Bind]] = deque()
        self._queues: dict[int, QueueTap] = {}
        self._warned: set[bytes] = set()
        self.counters = dict.fromkeys(
            ("bound", "asked", "drained", "poisoned", "unknown", "chunks_dropped", "failed_writes"),
            0,
        )
        manager.engine = EngineTap(manager.engine, self)
        PrefillGuard.current = self

    # -- wiring -------------------------------------------------------------------

    def tap_socket(self) -> None:
        manager = self._manager
        manager.server_socket = ReceiveTap(
            manager.server_socket, self._read, self._next_deferred, lambda: bool(self._deferred)
        )

    def tap_queue(self, queue: Any) -> QueueTap:
        """The tap of one transfer queue, also put where stock's scheduler finds it."""
        with self._lock:
            tap = self._queues.setdefault(id(queue), QueueTap(queue, self))
        queues = self._manager.transfer_queues
        for i, candidate in enumerate(queues):
            if candidate is queue:
                queues[i] = tap
        return tap

    def guards(self, manager: Any) -> bool:
        """True when every transfer queue of `manager` is tapped: no chunk can pass unseen."""
        return self._manager is manager and all(
            isinstance(queue, QueueTap) for queue in manager.transfer_queues
        )

    # -- messages from decode --------------------------------------------------------

    def _read(self, frames: list[bytes]) -> list[bytes] | None:
        stock, message = messages.split(frames)
        if isinstance(message, messages.Ask):
            self.counters["asked"] += 1
            with self._lock:
                actions = self._ledger.ask(
                    message.room, message.gen, message.reply_to, message.rank
                )
            self._act(actions)
            return None
        if isinstance(message, messages.Hello):
            self._here(message.reply_to, message.rank)
            return stock
        if isinstance(message, messages.Bind):
            return self._bind(stock, message)
        if message is not None:
            return None  # ours, and not for prefill
        if stock[0].isdigit():
            self._warn_unprotected(stock)
        return stock

    def _bind(self, stock: list[bytes], bind: messages.Bind) -> list[bytes] | None:
        with self._lock:
            delivery = self._ledger.bind(
                int(stock[0]), bind.gen, bind.reply_to, bind.rank, fan_in=int(stock[7])
            )
        if delivery is Delivery.DEFER:
            self._deferred.append((stock, bind))
            return None
        self._here(bind.reply_to, bind.rank, bind.gen)
        self.counters["bound"] += 1
        return stock if delivery is Delivery.DELIVER else None

    def _next_deferred(self) -> list[bytes] | None:
        """Metadata kept back whose predecessor is quiet by now."""
        for _ in range(len(self._deferred)):
            stock, bind = self._deferred.popleft()
            if (frames := self._bind(stock, bind)) is not None:
                return frames
        return None

    def _warn_unprotected(self, stock: list[bytes]) -> None:
        """Destinations from a decode that runs without safe-reclaim: say so, once each."""
        source = b":".join(stock[1:3])
        if source not in self._warned:
            self._warned.add(source)
            logger.warning(
                "safe-reclaim: decode %s runs without safe-reclaim; its KV slots are not "
                "protected; start it with --plugin",
                source.decode(),
            )

    def _here(self, reply_to: str, rank: str, gen: str | None = None) -> None:
        here = messages.Here(rank, self._ledger.incarnation, gen)
        self._replies.send(reply_to, messages.encode(here))

    # -- chunks (see taps.ChunkLedger) ---------------------------------------------------

    def put(self, chunk: Any) -> Attempt | None:
        with self._lock:
            attempt = self._ledger.put(chunk.room)
        if attempt is None:
            self.counters["chunks_dropped"] += 1
        return attempt

    def take(self, attempt: Attempt) -> bool:
        with self._lock:
            taken = self._ledger.take(attempt)
        if not taken:
            self.counters["chunks_dropped"] += 1
        return taken

    def opened(self, attempt: Attempt) -> None:
        with self._lock:
            self._ledger.opened(attempt)

    def done(self, attempt: Attempt) -> None:
        with self._lock:
            actions = self._ledger.done(attempt)
        self._act(actions)

    def failed(self, attempt: Attempt, reason: str) -> None:
        with self._lock:
            self._ledger.failed(attempt, reason)
        self.counters["failed_writes"] += 1

    def retire(self, room: int) -> None:
        with self._lock:
            actions = self._ledger.retire(room)
        self._act(actions)

    def busy(self, room: int) -> bool:
        with self._lock:
            return self._ledger.busy(room)

    # -- actions -------------------------------------------------------------------------

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, FailRoom):
                self._fail(action.room, action.reason)
            else:
                self._answer(action)

    def _answer(self, action: SendAnswer) -> None:
        self.counters[action.verdict] += 1
        answer = messages.Answer(
            action.rank, self._ledger.incarnation, action.gen, action.verdict, action.reason
        )
        self._replies.send(action.reply_to, messages.encode(answer))

    def _fail(self, room: int, reason: str) -> None:
        """End the room in stock as stock ends its own failures, so that its request ends.

        Only a room stock knows: a failure recorded for no request would be found by
        the next one that uses the room.
        """
        if room in self._manager.request_status:
            self._manager.record_failure(room, reason)
            self._manager.update_status(room, _FAILED)

    def report(self) -> dict[str, Any]:
        """Counters for `/server_info` and the lab."""
        return dict(self.counters)


def attach() -> None:
    """Wrap the prefill-side attach points. They do nothing until a prefill manager starts."""

    def init_engine(stock: Callable[..., Any], manager: Any) -> Any:
        result = stock(manager)
        if manager.disaggregation_mode.value == "prefill":
            PrefillGuard(manager)
        return result

    def start_prefill_thread(stock: Callable[..., Any], manager: Any) -> Any:
        if (guard := PrefillGuard.current) is not None:
            guard.tap_socket()
        return stock(manager)

    def transfer_worker(
        stock: Callable[..., Any], manager: Any, queue: Any, executor: Any, *args: Any, **kw: Any
    ) -> Any:
        if (guard := PrefillGuard.current) is not None:
            queue, executor = guard.tap_queue(queue), ExecutorTap(executor, guard)
        return stock(manager, queue, executor, *args, **kw)

    def poll(stock: Callable[..., Any], sender: Any) -> Any:
        """Failed is not shown while a write of the room still reads its source pages.

        Stock frees a failed room's source pages at once; the next owner's KV would
        then be sent in their place.
        """
        status = stock(sender)
        guard = PrefillGuard.current
        if status == _FAILED and guard is not None and guard.busy(sender.bootstrap_room):
            return type(status)(_TRANSFERRING)
        return status

    def clear(stock: Callable[..., Any], sender: Any) -> Any:
        result = stock(sender)
        if (guard := PrefillGuard.current) is not None:
            guard.retire(sender.bootstrap_room)
        return result

    wrap_method(f"{_MOONCAKE}:MooncakeKVManager.init_engine", init_engine)
    wrap_method(f"{_MOONCAKE}:MooncakeKVManager.start_prefill_thread", start_prefill_thread)
    wrap_method(f"{_MOONCAKE}:MooncakeKVManager.transfer_worker", transfer_worker)
    wrap_method(f"{_MOONCAKE}:MooncakeKVSender.poll", poll)
    wrap_method(f"{_MOONCAKE}:MooncakeKVSender.clear", clear)
