"""Prefill side: what is being written, what may no longer be, and when nothing is left.

One `PrefillSide` per scheduler process, created with the KV manager's engine.
Three kinds of threads meet here, so every ledger call is made under one lock:

    receive thread   ReceivingSocket: Bind (destinations arrive), Abort (an owner gave up)
    workers          QueueInterposer, ExecutorInterposer, EngineInterposer: chunks begin, end, fail
    scheduler        a sender is made, sends (QueueInterposer.put: a chunk is queued), is cleared
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes import release
from sglang_scaling_fixes.metrics import of_process
from sglang_scaling_fixes.reclaim import layout, messages
from sglang_scaling_fixes.reclaim.interposers import ReceivingSocket
from sglang_scaling_fixes.reclaim.metrics import PREFILL
from sglang_scaling_fixes.reclaim.prefill.actions import Actions
from sglang_scaling_fixes.reclaim.prefill.ends import RequestEnds
from sglang_scaling_fixes.reclaim.prefill.interposers import (
    EngineInterposer,
    ExecutorInterposer,
    QueueInterposer,
)
from sglang_scaling_fixes.reclaim.prefill.kept_back import KeptMessages
from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.coverage import Extent
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import Delivery, PrefillLedger
from sglang_scaling_fixes.reclaim.stock_shapes import prefill_reads
from sglang_scaling_fixes.reclaim.stock_wire import (
    PAGE_BYTES,
    PAGES_FRAME,
    SESSION_FRAME,
    is_metadata,
    is_number,
)
from sglang_scaling_fixes.reclaim.transport import ReplySockets, endpoint, new_incarnation

logger = logging.getLogger(__name__)


class Ticket:
    """A sender's key in the ledger. Only the sender has it, so it goes when the sender does.

    It may go anywhere, also under our lock, so all it does then is leave a note.
    """

    __slots__ = ("_dropped", "key", "room", "tokens")

    def __init__(self, key: int, room: int, dropped: deque[tuple[int, int]]) -> None:
        self.key, self.room = key, room
        self.tokens: int | None = None
        """Length of the prompt that stock computes for this sender, as far as it has said."""
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped.append((self.key, self.room))


class PrefillSide:
    """Safe reclaim of one prefill rank."""

    current: PrefillSide | None = None
    """The one of this process: SGLang makes one KV manager per scheduler process."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._ledger = PrefillLedger(new_incarnation())
        self._replies = ReplySockets()
        self.sends: dict[str, threading.Lock] = {}
        """Decode endpoint -> the one lock of stock's socket to it. Stock keeps both for good."""
        self._queues: dict[int, QueueInterposer] = {}
        self._sender: int | None = None
        self._keys = itertools.count(1)
        self._dropped: deque[tuple[int, int]] = deque()
        self._warned: set[str] = set()
        self._queued = False
        """Whether stock has queued a chunk since its last send began."""
        self.metrics = of_process(PREFILL, manager)
        self._deferred = KeptMessages(self._ledger.kept, self._lock, self.metrics)
        self._actions = Actions(manager, self._ledger.incarnation, self.metrics, self._reply)
        self.ends = RequestEnds(manager, self._ledger, self._lock, self._actions)

    # -- wiring -------------------------------------------------------------------

    def install(self) -> PrefillSide:
        """Watch every write of the manager's engine, and stand for this process."""
        engine = self._manager.engine
        self._manager.engine = EngineInterposer(engine, self, once=release.mooncake_retries())
        PrefillSide.current = self
        return self

    def tap_socket(self) -> None:
        manager = self._manager
        manager.server_socket = ReceivingSocket(
            manager.server_socket, self.read, self._next_deferred, lambda: bool(self._deferred)
        )

    def tap_queue(self, queue: Any) -> QueueInterposer:
        """The tap of one transfer queue, also put where stock's scheduler finds it."""
        with self._lock:
            tap = self._queues.setdefault(id(queue), QueueInterposer(queue, self))
        queues = self._manager.transfer_queues
        for i, candidate in enumerate(queues):
            if candidate is queue:
                queues[i] = tap
        return tap

    def work(
        self, stock: Any, manager: Any, queue: Any, executor: Any, *args: Any, **kw: Any
    ) -> Any:
        """Stock's transfer worker over the tapped queue and executor, in its own thread."""
        tap = self.tap_queue(queue)
        try:
            return stock(manager, tap, ExecutorInterposer(executor, self), *args, **kw)
        finally:
            tap.end()  # it ends at any exception, and writes nothing from here on

    def protects(self, manager: Any) -> bool:
        """True when every transfer queue of `manager` is tapped: no chunk can pass unseen."""
        return self._manager is manager and all(
            isinstance(queue, QueueInterposer) for queue in manager.transfer_queues
        )

    def _reply(self, to: str, frame: bytes) -> bool:
        return self._replies.send(to, frame)

    # -- messages from decode --------------------------------------------------------

    def read(self, frames: list[bytes]) -> list[bytes] | None:
        stock, message = messages.strip_trailer(frames)
        if message is messages.GARBAGE or not _for_prefill(self._manager, stock, message):
            self.metrics.inc("garbage")
            return None
        if isinstance(message, messages.Bind):
            came = None if message.waited is None else time.monotonic() - message.waited
            return self._bind(stock, message, came)
        if isinstance(message, messages.Abort):
            self.metrics.inc("aborts_received")
            with self._lock:
                actions = self._ledger.abort(
                    message.room, message.lease, message.reply_to, message.rank
                )
            self._actions.act(actions)
            self._deferred.gave_up(message.lease)
            return None
        if isinstance(message, messages.Refusal):
            self.metrics.inc("refusals_received")
            with self._lock:
                actions = self._ledger.refused(message.room, time.monotonic())
            self._actions.act(actions)
            return None
        if isinstance(message, messages.Hello):
            self._actions.greet(message.reply_to, message.rank, seq=message.seq)
            return stock
        if stock[0] == b"ABORT" and len(stock) > 1 and is_number(stock[1]):
            self.ends.given_up(int(stock[1]))
        return self._bind_without_plugin(stock) if stock[0].isdigit() else stock

    def _bind(
        self, stock: list[bytes], bind: messages.Bind, came: float | None
    ) -> list[bytes] | None:
        self._deferred.came(bind.lease)
        session = stock[SESSION_FRAME].decode("ascii", "replace")
        extent = Extent(session, bind.pages, bind.states, bind.tokens)
        to = bind.reply_to, bind.rank
        with self._lock:
            delivery, actions = self._ledger.bind(
                int(stock[0]), bind.attempt_id, bind.lease, *to, extent=extent, came=came
            )
            self._actions.forget_rooms(actions)
        if delivery is not Delivery.DEFER and bind.expects != self._ledger.incarnation:
            self._actions.greet(*to, bind.lease)
        self._actions.act(actions)
        if delivery is Delivery.DEFER:
            self._deferred.keep(bind.lease, lambda: self._bind(stock, bind, came))
            return None
        if delivery is Delivery.REFUSE:
            self._deferred.refused(int(stock[0]))
        self.metrics.inc("bound")
        return stock if delivery is Delivery.DELIVER else None

    def _bind_without_plugin(self, stock: list[bytes]) -> list[bytes] | None:
        """Destinations without a lease.

        From a decode that runs without safe-reclaim (say so, once each), or none at
        all: the empty ones of a rank that only has to know of the request.
        """
        host, port = (frame.decode("ascii", "replace") for frame in stock[1:3])
        source = endpoint(host, port)
        key = int(stock[0]), source
        self._deferred.came(key)
        if stock[4] and source not in self._warned:
            self._warned.add(source)
            logger.warning(
                "safe-reclaim: decode %s runs without safe-reclaim; its KV slots are not "
                "protected; start it with --plugin",
                source,
            )
        session = stock[SESSION_FRAME].decode("ascii", "replace")
        pages = len(stock[PAGES_FRAME]) // PAGE_BYTES
        extent = Extent(session, 0 if layout.counts_rows(self._manager, session) else pages)
        with self._lock:
            delivery, actions = self._ledger.bind_without_plugin(int(stock[0]), source, extent)
            self._actions.forget_rooms(actions)
        self._actions.act(actions)
        if delivery is Delivery.DEFER:
            self._deferred.keep(key, lambda: self._bind_without_plugin(stock))
        elif delivery is Delivery.REFUSE:
            self._deferred.refused(key[0])
        return stock if delivery is Delivery.DELIVER else None

    def _next_deferred(self) -> list[bytes] | None:
        """Destinations kept back whose predecessor is over by now."""
        self._retire_dropped()
        return self._deferred.next()

    # -- stock's senders ---------------------------------------------------------------

    def sender_made(self, sender: Any) -> None:
        """Stock made a sender. It may never clear it (several abort paths do not)."""
        self._retire_dropped()
        ticket = Ticket(next(self._keys), sender.bootstrap_room, self._dropped)
        sender.sglang_scaling_fixes_ticket = ticket
        with self._lock:
            actions = self._ledger.sender_made(ticket.key, ticket.room, time.monotonic())
        self._actions.act(actions)

    def _retire_dropped(self) -> None:
        """Retire senders the interpreter has dropped."""
        while self._dropped:
            key, room = self._dropped.popleft()
            with self._lock:
                actions = self._ledger.retire(key, room)
            self._actions.act(actions)

    def computes(self, request: Any) -> None:
        """Stock is about to send KV of `request`: how long is the prompt that it computed?

        Read now, not when the request came: stock replaces the prompt of a request it
        rejects by a placeholder.
        """
        ticket = getattr(request.disagg_kv_sender, "sglang_scaling_fixes_ticket", None)
        if ticket is not None:  # stock's fake transfers have none
            ticket.tokens = len(request.origin_input_ids)

    def send(
        self,
        stock: Callable[..., Any],
        sender: Any,
        kv_indices: Any,
        state_indices: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stock's send: the chunk it queues is this sender's, or this rank's share of it."""
        ticket: Ticket = sender.sglang_scaling_fixes_ticket
        states = None
        if state_indices is not None:
            states = layout.state_rows(self._manager.kv_args, state_indices)
        with self._lock:
            self._ledger.offer(ticket.key, len(kv_indices), states, ticket.tokens)
        self._sender, self._queued = ticket.key, False
        try:
            return stock(sender, kv_indices, state_indices, *args, **kwargs)
        finally:
            self._sender = None
            if len(kv_indices) and not self._queued and not layout.may_send_nothing(self._manager):
                with self._lock:
                    self._ledger.skipped(ticket.key)

    def retire(self, sender: Any) -> None:
        ticket: Ticket = sender.sglang_scaling_fixes_ticket
        with self._lock:
            actions = self._ledger.retire(ticket.key, ticket.room)
        self._actions.act(actions)

    def busy(self, sender: Any) -> bool:
        with self._lock:
            return self._ledger.busy(sender.sglang_scaling_fixes_ticket.key)

    # -- chunks (see interposers.ChunkLedger) ---------------------------------------------------

    def put(self, chunk: Any) -> Attempt | None:
        del chunk  # its room does not say whose it is; the sender that queues it does
        self._queued = True
        with self._lock:
            attempt = self._ledger.put(self._sender)
        if attempt is None:
            self.metrics.inc("chunks_dropped")
        return attempt

    def take(self, attempt: Attempt, chunk: Any) -> bool:
        pages, last = len(chunk.prefill_kv_indices), bool(chunk.is_last_chunk)
        with self._lock:
            taken = self._ledger.take(attempt, pages, last)
        if not taken:
            self.metrics.inc("chunks_dropped")
        return taken

    def opened(self, attempt: Attempt) -> None:
        with self._lock:
            self._ledger.opened(attempt)

    def wrote(self, attempt: Attempt, session: str) -> None:
        attempt.coverage.writes.append(session)  # one step: without the lock

    def done(self, attempt: Attempt) -> None:
        with self._lock:
            actions = self._ledger.done(attempt)
        self._actions.act(actions)

    def failed(self, attempt: Attempt, reason: str) -> None:
        with self._lock:
            first = not attempt.poisoned
            actions = self._ledger.failed(attempt, reason)
        self.metrics.inc("failed_writes")
        if first:
            self.metrics.inc("poisoned_rooms")
        self._actions.act(actions)

    def mark(self, to: str, attempt: Attempt) -> bytes | None:
        """The trailer of a success that goes to decode endpoint `to`."""
        with self._lock:
            bound = attempt.bound_at(to)
        return None if bound is None else messages.encode(messages.SuccessTag(*bound))

    def success_leaves(self, to: str, attempt: Attempt) -> bool:
        """May the success leave for the decode rank at endpoint `to`, or is it a failure?"""
        sends_kv = functools.partial(layout.sends_kv, self._manager)
        with self._lock:
            first = not attempt.short
            leaves = self._ledger.success_leaves(attempt, to, sends_kv)
        if not leaves and attempt.short:
            self.metrics.inc("short_sends")
            if first:
                logger.error(
                    "safe-reclaim: room %d: %s; decode is told that the transfer failed",
                    attempt.room,
                    attempt.short,
                )
        return leaves

    def wrote_aux(self, to: str, attempt: Attempt) -> None:
        """The metadata for the decode rank at endpoint `to` leave in a message of stock's."""
        with self._lock:
            extent = attempt.exposed_at(to)
        if extent is not None:
            self.wrote(attempt, extent.session)

    # -- reporting -----------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Counters for `/server_info` and the lab."""
        return self.metrics.report()


def _for_prefill(manager: Any, stock: list[bytes], message: messages.Message | None) -> bool:
    """Something a decode rank says, as far as it is read here and by stock."""
    if isinstance(message, messages.Bind):
        return is_metadata(stock)  # it came as it was sent: its Bind counts its frames
    if isinstance(message, messages.Abort | messages.Refusal):
        return True
    if isinstance(message, messages.Hello):
        return stock[:1] == [b"None"]
    return message is None and bool(stock) and prefill_reads(manager, stock)
