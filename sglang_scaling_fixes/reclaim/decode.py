"""Decode side: from stock SGLang's calls to the ledger's events, and back.

One `DecodeGuard` per scheduler process. It is created with the KV manager, learns
of exposures from `send_metadata`, of endings from `clear`, of prefill's answers
from the manager's own receive socket, and acts once per scheduler tick:

    receive thread   ReceiveTap: Here, Answer -> ledger; a success of another
                     generation never reaches stock
    scheduler        send_metadata -> expose     clear -> landed | give_up
                     tick: Asks out; proven exposures agreed among the TP ranks
                     and given back

The ledger is shared by the two threads, under one lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq
from msgspec import structs

from sglang_scaling_fixes.alarm import end_server
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.metrics import of_process
from sglang_scaling_fixes.reclaim import fence, layout, messages
from sglang_scaling_fixes.reclaim.gate import Gate
from sglang_scaling_fixes.reclaim.layout import FAILED, SUCCESS, WAITING
from sglang_scaling_fixes.reclaim.ledger import REASONS, DecodeLedger, Exposure
from sglang_scaling_fixes.reclaim.liveness import Liveness
from sglang_scaling_fixes.reclaim.metrics import DECODE
from sglang_scaling_fixes.reclaim.pace import Pace
from sglang_scaling_fixes.reclaim.quarantine import GRACE, Hold, Quarantine, worth_a_fence
from sglang_scaling_fixes.reclaim.retry_after import REFUSAL
from sglang_scaling_fixes.reclaim.stock_ack import StockAborts
from sglang_scaling_fixes.reclaim.taps import (
    AUX_DATA,
    Passthrough,
    ReceiveTap,
    is_number,
    is_success,
)
from sglang_scaling_fixes.reclaim.transport import endpoint, new_incarnation, send_now

logger = logging.getLogger(__name__)

SAY_HELD_AFTER = 5.0
"""Seconds an exposure is held before the log says why, then every minute."""
REQUIRE_WAIT = 1.0
"""Seconds to wait for a prefill's first word under `--safe-reclaim-peer require`."""
REQUIRE_RETRY = 30.0
"""Seconds before a silent prefill is waited for again."""
SHOW_EVERY = 1.0
"""Seconds between two updates of the gauges while something is held."""


class DecodeGuard:
    """Safe reclaim of one decode rank. All but `_read` runs on the scheduler thread."""

    current: DecodeGuard | None = None
    """The guard of this process: SGLang makes one KV manager per scheduler process."""

    def __init__(self, manager: Any, config: Config) -> None:
        self._manager = manager
        self._config = config
        self.ledger = DecodeLedger(new_incarnation(), first_wait=config.resend)
        self._reply_to = endpoint(manager.local_ip, manager.rank_port)
        self._lock = threading.Lock()
        self._routes: dict[str, Callable[[], tuple[Any, Any]]] = {}
        """Rank -> stock's own look-up of its socket and lock (stock may replace them)."""
        self._hello_on: dict[str, Any] = {}
        """Rank -> the socket its last Hello left on."""
        self._sending: tuple[Exposure, messages.Bind] | None = None
        """What stock is sending destinations for, and what goes with them but for the rank."""
        self._stock_success: dict[int, set[bytes]] = {}
        self._next_say: dict[str, float] = {}
        self._next_show = 0.0
        self._silent_until: dict[str, float] = {}
        self._group: Any = None
        self._buffers: Any = None
        self.gate: Gate | None = None
        self._quarantine: Quarantine | None = None
        self.refusing = False
        """More is held than allowed: new requests are refused. The same on all TP ranks."""
        self._liveness = Liveness()
        self._registrations: dict[str, list[bytes]] = {}
        """Rank -> stock's message that registered this decode's buffers there."""
        self._fenced_sessions: set[bytes] = set()
        self._no_fence = fence.obstacle(getattr(manager, "server_args", None))
        """Why a fence is impossible here, None if it is not: then refusing has to do."""
        self._untold: set[str] = set()
        """Ranks that do not know the present session yet: they get no destinations."""
        self._pace = Pace()
        self._stock_aborts = StockAborts(config.resend) if config.peer == "stock-ack" else None
        self.metrics = of_process(DECODE, manager)
        self._held_tokens_max = 0
        manager.server_socket = ReceiveTap(manager.server_socket, self._read)
        layout.check_states(manager.kv_args)
        DecodeGuard.current = self

    # -- wiring ---------------------------------------------------------------

    def install_gate(self, queue: Any) -> None:
        """Wrap the allocators of stock's preallocation queue, once they exist."""
        allocator = queue.token_to_kv_pool_allocator
        layout.check_allocator(allocator)
        layout.check_shared_windows(self._manager)
        layout.rebind_captured(queue.tree_cache, allocator)
        self.gate = Gate(
            allocator, queue.req_to_metadata_buffer_idx_allocator, audit=self._config.audit
        )
        self._quarantine = Quarantine(
            tokens=allocator.size,
            metadata=queue.req_to_metadata_buffer_idx_allocator.available_size(),
            max_held=self._config.max_held,
        )
        self._group = queue.gloo_group
        self.ledger.group = self._common_identity()
        self._buffers = queue.metadata_buffers

    def guards(self, manager: Any) -> bool:
        """True when `manager` and its allocators are behind this guard."""
        return self._manager is manager and self.gate is not None

    def _common_identity(self) -> str:
        """TP rank 0's incarnation, on every TP rank: what their epochs share."""
        if self._alone():
            return self.ledger.group
        import torch.distributed as dist

        identity = [self.ledger.group]
        dist.broadcast_object_list(
            identity, src=dist.get_global_rank(self._group, 0), group=self._group
        )
        return identity[0]

    def _of_all_ranks(self, ports: set[int]) -> set[int]:
        """The union over the TP ranks, once all of them have got here."""
        if self._alone():
            return ports
        import torch.distributed as dist

        found: list[set[int]] = [set()] * dist.get_world_size(self._group)
        dist.all_gather_object(found, ports, group=self._group)
        return set().union(*found)

    def _alone(self) -> bool:
        import torch.distributed as dist

        return self._group is None or dist.get_world_size(self._group) == 1

    # -- exposure ---------------------------------------------------------------

    def send_metadata(
        self,
        stock: Callable[..., Any],
        receiver: Any,
        kv_indices: np.ndarray,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock sends the destinations of a request; from here on they are exposed."""
        assert self.gate is not None, "send_metadata before the allocators exist"
        ranks = [rank_of(info) for info in receiver.bootstrap_infos or () if not info["is_dummy"]]
        with self._lock:
            exposure = self.ledger.expose(receiver.bootstrap_room, ranks)
        shared = layout.page_states(self._manager.kv_args, state_indices)
        self.gate.exposed(exposure, kv_indices, shared, aux_index)
        self.metrics.inc("exposures")
        receiver.sglang_scaling_fixes_exposure = exposure
        if self._config.peer == "require" and not self._all_speak(ranks):
            self._refuse(receiver, ranks)
            return None
        if self._untold and (untold := self._still_untold(receiver)):
            self._end(
                receiver.bootstrap_room,
                f"prefill {', '.join(untold)} takes no messages and does not know this decode's "
                "session since it fenced its memory: retry the request",
            )
            return None
        tokens = getattr(receiver, "sglang_scaling_fixes_tokens", None)
        bind = messages.Bind(
            self._reply_to,
            "",
            exposure.gen,
            exposure.epoch,
            pages=len(kv_indices),
            states=layout.state_rows(self._manager.kv_args, state_indices),
            tokens=None if tokens is None else tokens(),
        )
        self._sending = exposure, bind
        try:
            return stock(receiver, kv_indices, aux_index, state_indices, **kwargs)
        finally:
            self._sending = None

    def outgoing(
        self,
        rank: str,
        route: Callable[[], tuple[Any, Any]],
        frames: list[bytes],
        socket: Any = None,
    ) -> list[bytes]:
        """Add our trailer to what stock sends to a prefill rank, under the socket's lock."""
        self._routes[rank] = route
        registers = frames[0] == b"None"  # stock's message about this decode's buffers
        names_session = registers or frames[0].isdigit()
        if names_session and frames[messages.SESSION_FRAME] in self._fenced_sessions:
            # Stock's receiver of old releases keeps the session it was made under.
            frames[messages.SESSION_FRAME] = self._session()
        if registers:
            self._registrations[rank] = frames
            self._untold.discard(rank)
            return self._greeted(rank, frames, socket)
        if frames[0] == b"ABORT":
            self._stock_abort(int(frames[1]), rank, frames)
            return frames
        if self._sending is None or rank not in self._sending[0].writers:
            return frames
        exposure, bind = self._sending
        with self._lock:
            self.ledger.sent(exposure, rank, after_hello=self._hello_on.get(rank) is socket)
            expects = exposure.writers[rank].incarnation
        return messages.ride(frames, structs.replace(bind, rank=rank, expects=expects))

    def _greeted(self, rank: str, frames: list[bytes], socket: Any) -> list[bytes]:
        """Stock's registration with a numbered Hello: who serves `rank` is asked anew."""
        self._hello_on[rank] = socket
        with self._lock:
            seq = self.ledger.hello(rank)
        return messages.ride(frames, messages.Hello(self._reply_to, rank, seq=seq))

    def _stock_abort(self, room: int, rank: str, frames: list[bytes]) -> None:
        if self._stock_aborts is None:
            return
        with self._lock:
            exposed = any(exposure.room == room for exposure in self.ledger.exposures())
        if exposed:
            self._stock_aborts.sent(room, rank, frames)
        else:
            self._stock_aborts.unexposed(room)

    def _all_speak(self, ranks: list[str]) -> bool:
        """Wait a moment for a first word, once in a while per rank: this is the scheduler."""
        now = time.monotonic()
        deadline = now + REQUIRE_WAIT
        while silent := [rank for rank in ranks if rank not in self.ledger.peers]:
            known_silent = all(self._silent_until.get(rank, 0.0) > now for rank in silent)
            if known_silent or time.monotonic() >= deadline:
                self._silent_until.update(dict.fromkeys(silent, now + REQUIRE_RETRY))
                return False
            time.sleep(0.005)
        return True

    def _refuse(self, receiver: Any, ranks: list[str]) -> None:
        silent = [rank for rank in ranks if rank not in self.ledger.peers]
        self.metrics.inc("refusals", "peer")
        self._end(
            receiver.bootstrap_room,
            f"prefill {', '.join(silent)} runs without safe-reclaim; start it with --plugin, "
            "or this decode with --safe-reclaim-peer hold",
        )

    def _end(self, room: int, reason: str) -> None:
        """Fail a room in stock, as stock fails its own."""
        self._manager.record_failure(room, reason)
        self._manager.update_status(room, FAILED)

    # -- endings ------------------------------------------------------------------

    def succeeded(self, stock: Callable[..., Any], receiver: Any) -> Any:
        """Stock's poll says success, which is shown only if it is this attempt's.

        Stock counts by room, some time after the success was admitted: one of the
        attempt before may be counted for this one. Then the room waits on, so that
        stock's own time-out and failure paths see it waiting. A mark is in the ledger
        before stock counts the success that carries it, so looking again after the
        change loses none.
        """
        with getattr(receiver, "_lifecycle_lock", contextlib.nullcontext()):
            status = stock(receiver)  # again: it may have been aborted before the lock was ours
            if status != SUCCESS or self._complete(receiver):
                return status
            waiting = type(status)(WAITING)
            receiver.conclude_state = None
            room = receiver.bootstrap_room
            if self._manager.request_status.get(room) == status:  # no failure came meanwhile
                self._manager.request_status[room] = waiting
                if self._complete(receiver):
                    self._manager.update_status(room, status)
            return waiting

    def _complete(self, receiver: Any) -> bool:
        exposure: Exposure | None = getattr(receiver, "sglang_scaling_fixes_exposure", None)
        if exposure is None:
            return True
        with self._lock:
            return self.ledger.complete(exposure)

    def commit(self, stock: Callable[..., Any], queue: Any, request: Any) -> Any:
        """Stock hands the KV to its request, which it does on every TP rank or on none."""
        receiver = request.kv_receiver
        receiver.sglang_scaling_fixes_commit = True
        try:
            return stock(queue, request)
        finally:
            receiver.sglang_scaling_fixes_commit = False

    def clearing(self, receiver: Any) -> None:
        """Stock is about to forget the room: the owner takes its KV, or gives it up."""
        exposure: Exposure | None = getattr(receiver, "sglang_scaling_fixes_exposure", None)
        if exposure is None:
            return
        try:
            self._ended(receiver, exposure)
        except Exception as error:
            # Stock goes on to free the slots, whatever is raised here.
            logger.exception("safe-reclaim: room %d", exposure.room)
            end_server(
                f"safe-reclaim: the end of room {exposure.room} could not be recorded "
                f"({type(error).__name__}: {error})"
            )
        receiver.sglang_scaling_fixes_exposure = None

    def _ended(self, receiver: Any, exposure: Exposure) -> None:
        assert self.gate is not None
        # Not the receiver's own success: a rank may have that alone when stock ends the
        # request on all of them (aborted, failed elsewhere, no room to restore a prefix).
        if getattr(receiver, "sglang_scaling_fixes_commit", False):
            with self._lock:
                self.ledger.landed(exposure)
            self.gate.landed(exposure)
            self.metrics.inc("landed")
            return
        room = receiver.bootstrap_room
        success = self._manager.request_status.get(room) == SUCCESS
        with self._lock:
            self.ledger.give_up(exposure, time.monotonic(), success_seen=success)
            self.gate.gave_up(exposure)
            # Ranks without safe-reclaim that reported before the owner gave up. Copied in one
            # step: stock's receive thread adds to the set without our lock.
            reported = tuple(self._manager.prefill_response_tracker.get(room, ()))
            self._stock_success[room] = {str(rank).encode() for rank in reported}
        if self._stock_aborts is not None:
            self._stock_aborts.watch(room, len(receiver.bootstrap_infos or ()))
        self.metrics.inc("gave_up")
        self._send_asks()

    # -- once per scheduler tick ---------------------------------------------------

    def tick(self) -> None:
        """Ask again, give back what is proven on every TP rank, fence past the bound."""
        if not self.ledger.holding:
            return
        assert self.gate is not None
        self.gate.settle()
        self._send_asks()
        with self._lock:
            held = self.ledger.held
            proven = [not exposure.unproven for exposure in held]
        over, to_fence = self._past_the_bound(held)
        *agreed, bounded, spared = self._agree([*proven, not over, not to_fence])
        for exposure, returns in zip(held, agreed, strict=True):
            if returns:
                self._give_back(exposure)
        self._refuse_requests(not bounded)
        if not spared:
            self._fence()
        self._held_tokens_max = max(self._held_tokens_max, self.gate.held_tokens)
        self._say_what_is_held()
        if not self.ledger.holding:
            self._refuse_requests(False)
            self._show_holds()

    def holding(self) -> bool:
        """True while the scheduler must not call itself idle."""
        return self.ledger.holding

    def _agree(self, proven: list[bool]) -> list[bool]:
        """What every TP rank has proof of. All ranks hold the same list in the same order."""
        if self._alone():
            return proven
        import torch
        import torch.distributed as dist

        flags = torch.tensor(proven, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=self._group)
        return [bool(flag) for flag in flags.tolist()]

    def _give_back(self, exposure: Exposure) -> None:
        assert self.gate is not None
        slots = self.gate.slots(exposure)
        if slots.aux is not None and hasattr(self._buffers, "clear_slot"):
            # Stock clears a metadata slot when it frees it; a write may have
            # landed in it since.
            self._buffers.clear_slot(slots.aux)
        with self._lock:
            self.ledger.returned(exposure)
            self._stock_success.pop(exposure.room, None)
        tokens = self.gate.give_back(exposure)
        if self._stock_aborts is not None:
            self._stock_aborts.forget(exposure.room)
        self._next_say.pop(exposure.gen, None)
        self.metrics.inc("returned")
        for writer in exposure.writers.values():
            if writer.proof is not None:
                self.metrics.inc("frees", writer.proof.value)
        seconds = time.monotonic() - exposure.gave_up_at
        self.metrics.observe("hold_seconds", seconds)
        logger.info(
            "safe-reclaim: room %d: %d token slots back after %.3f s, proof %s",
            exposure.room,
            tokens,
            seconds,
            ",".join(sorted({w.proof or "" for w in exposure.writers.values()})) or "P1",
        )

    def _send_asks(self) -> None:
        now = time.monotonic()
        with self._lock:
            asks = self.ledger.tick(now)
        for ask in asks:
            if not self._pace.may(ask.rank, now):
                continue  # its queue, which is stock's as well, must not fill up
            message = messages.Ask(self._reply_to, ask.rank, ask.room, ask.gen)
            self._send(ask.rank, [messages.encode(message)])
            self.metrics.inc("asks")
            if ask.again:
                self.metrics.inc("asks_resent")
        if self._stock_aborts is not None:
            for rank, frames in self._stock_aborts.due(now):
                self._send(rank, frames)

    def _send(self, rank: str, frames: list[bytes], *, registers: bool = False) -> bool:
        """To a prefill rank on stock's socket, without blocking. False: ask again later."""
        try:
            socket, lock = self._routes[rank]()
        except zmq.ZMQError as error:  # stock could not make a socket
            logger.debug("safe-reclaim: no socket to %s: %s", rank, error)
            return False
        with lock:
            return send_now(socket, self._greeted(rank, frames, socket) if registers else frames)

    # -- past the bound --------------------------------------------------------------

    def _past_the_bound(self, held: list[Exposure]) -> tuple[bool, bool]:
        """Is too much held, and is a fence called for? This rank's view; the ranks agree."""
        assert self._quarantine is not None and self.gate is not None
        now = time.monotonic()
        holds = []
        for exposure in held:
            slots = self.gate.slots(exposure)
            age = now - exposure.gave_up_at
            holds.append(Hold(age, self.gate.tokens(slots), slots.aux is not None))
        over = self._quarantine.over(holds)
        if self._no_fence:
            return over, False
        with self._lock:
            suspects = [
                (hold.age, writer, self.ledger.replaced(writer))
                for exposure, hold in zip(held, holds, strict=True)
                if hold.age > GRACE
                for writer in exposure.unproven
            ]
            flying = len(self.ledger.exposures()) - len(held)
        self._liveness.look(writer.rank for _, writer, _ in suspects)
        gone = [
            age
            for age, writer, replaced in suspects
            if replaced or self._liveness.gone(writer.rank)
        ]
        if over:
            return True, bool(gone) or (self._config.fence and bool(suspects))
        return False, worth_a_fence(max(gone, default=0.0), flying)

    def _refuse_requests(self, refusing: bool) -> None:
        if refusing and not self.refusing:
            assert self.gate is not None
            logger.error(
                "safe-reclaim: %d token slots are held without proof, more than "
                "--safe-reclaim-max-held %g allows: new requests are refused with 503 until "
                "proof comes; the log and /server_info say what is held and why%s",
                self.gate.held_tokens,
                self._config.max_held,
                f" (no fence: {self._no_fence})" if self._no_fence else "",
            )
        self.refusing = refusing

    def refuse(self, queue: Any, req: Any) -> None:
        """End a request that has not been admitted with 503, as stock ends its own refusals."""
        from http import HTTPStatus

        from sglang.srt.disaggregation.utils import prepare_abort

        self.metrics.inc("refusals", "held")
        message = f"{REFUSAL}; retry here later, or at another decode now"
        prepare_abort(req, message, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        scheduler = queue.scheduler
        streamer = getattr(scheduler, "output_streamer", scheduler)
        streamer.stream_output([req], req.return_logprob)

    def _tell(self, rank: str) -> bool:
        """Register at `rank` again under the present session. False: its queue is full."""
        frames = self._registrations[rank]
        frames[messages.SESSION_FRAME] = self._session()
        told = self._send(rank, frames, registers=True)
        if told:
            self._untold.discard(rank)
        return told

    def _still_untold(self, receiver: Any) -> list[str]:
        """Ranks of this receiver that take no registration even now."""
        addressed = {rank_of(info) for info in receiver.bootstrap_infos or ()}
        return [rank for rank in self._untold & addressed if not self._tell(rank)]

    def _session(self) -> bytes:
        return str(self._manager.get_session_id()).encode("ascii")

    def _fence(self) -> None:
        """Make everything sent so far harmless (P4), and be reachable again under a new session.

        The engine goes first: only when nothing can land any more does the ledger learn
        of it. Transfers in flight are lost with it and end as failed.
        """
        logger.error(
            "safe-reclaim: fencing: the receiving engine is replaced, transfers in flight end"
        )
        began = time.monotonic()
        old, new = fence.renew(self._manager, self._of_all_ranks)
        self._fenced_sessions.add(old.encode("ascii"))
        with self._lock:
            lost = self.ledger.fence()
        for exposure in lost:
            if self._manager.request_status.get(exposure.room) != SUCCESS:
                self._end(
                    exposure.room,
                    "this decode fenced its memory (safe-reclaim) while the KV was on its way: "
                    "retry the request",
                )
        self._untold.update(self._registrations)
        for rank in self._registrations:
            self._tell(rank)
        self.metrics.inc("fences")
        logger.error(
            "safe-reclaim: fenced in %.1f s: session %s is gone, %s took its place; %d transfers "
            "in flight were ended",
            time.monotonic() - began,
            old,
            new,
            len(lost),
        )

    # -- saying what is held -----------------------------------------------------------

    def _say_what_is_held(self) -> None:
        now = time.monotonic()
        if now >= self._next_show:
            self._next_show = now + SHOW_EVERY
            self._show_holds()
        for exposure in self.ledger.held:
            due = self._next_say.setdefault(exposure.gen, exposure.gave_up_at + SAY_HELD_AFTER)
            if now >= due:
                self._next_say[exposure.gen] = now + 60.0
                logger.warning(
                    "safe-reclaim: room %d held for %.0f s: %s",
                    exposure.room,
                    now - exposure.gave_up_at,
                    self.ledger.why_held(exposure),
                )

    def _show_holds(self) -> None:
        """Bring the gauges up to date."""
        assert self.gate is not None
        with self._lock:
            reasons = Counter(self.ledger.reason(exposure) for exposure in self.ledger.held)
        self.metrics.set("held_tokens", self.gate.held_tokens)
        for reason in REASONS:
            self.metrics.set("holds", reasons[reason], reason)

    # -- messages from prefill -------------------------------------------------------

    def _read(self, frames: list[bytes]) -> list[bytes] | None:
        """Runs on stock's receive thread: sort out what is ours, leave the rest."""
        stock, message = messages.split(frames)
        if message is messages.GARBAGE or not self._for_decode(stock, message):
            self.metrics.inc("garbage")
            return None
        if is_success(stock):
            mark = message if isinstance(message, messages.Mark) else None
            if mark is not None:
                self._pace.heard(mark.rank)
            return stock if self._admits(int(stock[0]), mark, stock[2]) else None
        if isinstance(message, messages.Here | messages.Answer):
            self._pace.heard(message.rank)
            with self._lock:
                self._hear(message)
            return None
        if stock[0] == b"ABORT_ACK" and self._stock_aborts is not None:
            self._acked(stock)
        if stock[0] == AUX_DATA and not self._takes_aux(stock, message):
            return None
        return stock

    def _takes_aux(self, stock: list[bytes], message: messages.Message | None) -> bool:
        """Not a late copy, into a slot that is no longer this room's or this attempt's."""
        room, aux = int(stock[1]), int(stock[3])
        if self.gate is not None and not self.gate.owns_aux(aux, room):
            return False
        if not isinstance(message, messages.Mark):
            return True
        with self._lock:
            return self.ledger.admits_success(room, message.gen)

    def _acked(self, frames: list[bytes]) -> None:
        """Stock's acknowledgement that a room has drained, believed under `stock-ack`."""
        assert self._stock_aborts is not None
        if (room := self._stock_aborts.acked(frames)) is not None:
            with self._lock:
                for exposure in self.ledger.held:
                    if exposure.room == room:
                        self.ledger.acked(room, len(exposure.writers))

    def _for_decode(self, stock: list[bytes], message: messages.Message | None) -> bool:
        """Something a prefill rank says, as far as it is read here."""
        if isinstance(message, messages.Here | messages.Answer):
            return message.rank in self._routes
        marked = isinstance(message, messages.Mark)
        if not stock or (message is not None and not marked):
            return False
        if marked and not is_success(stock) and stock[0] != AUX_DATA:
            return False
        if stock[0] == AUX_DATA:
            return len(stock) > 3 and is_number(stock[1]) and is_number(stock[3])
        # A status: stock reads room, status and prefill rank.
        status = len(stock) > 2 and all(is_number(frame) for frame in stock[:3])
        return status if stock[0].isdigit() else stock[0].isascii()

    def _hear(self, message: messages.Here | messages.Answer) -> None:
        if isinstance(message, messages.Here):
            self.ledger.here(message.rank, message.incarnation, message.gen, message.seq)
            return
        exposure = self.ledger.answer(
            message.rank, message.incarnation, message.gen, message.verdict, message.reason
        )
        if exposure is None:
            self.metrics.inc("stale")
        elif exposure.writers[message.rank].proof is not None:
            self.metrics.observe("ack_seconds", time.monotonic() - exposure.gave_up_at)

    def _admits(self, room: int, mark: messages.Mark | None, prefill_rank: bytes) -> bool:
        """A success: stock learns of it only if it is the open generation's."""
        with self._lock:
            if mark is not None:
                self.ledger.marked(mark.gen, mark.rank)
            elif any(e.room == room for e in self.ledger.held):
                reported = self._stock_success.setdefault(room, set())
                reported.add(prefill_rank)
                self.ledger.success(room, len(reported))
            admitted = self.ledger.admits_success(
                room, mark.gen if mark is not None else None, prefill_rank
            )
        if not admitted:
            self.metrics.inc("stale")
        return admitted

    # -- reporting --------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Counters and holds for `/server_info` and the lab."""
        with self._lock:
            held = [
                {"room": e.room, "state": e.state.value, "why": self.ledger.why_held(e)}
                for e in self.ledger.held
            ]
        return {
            **self.metrics.report(),
            "held_tokens": self.gate.held_tokens if self.gate is not None else 0,
            "held_tokens_max": self._held_tokens_max,
            "refusing": self.refusing,
            "held": held,
            "peers": len(self.ledger.peers),
        }


class OutgoingTap(Passthrough):
    """The socket to one prefill rank: stock's messages leave with our trailer."""

    def __init__(
        self, stock: Any, rank: str, route: Callable[[], tuple[Any, Any]], guard: DecodeGuard
    ) -> None:
        super().__init__(stock)
        self._rank = rank
        self._route = route
        self._guard = guard

    def send_multipart(self, frames: list[bytes], *args: Any, **kwargs: Any) -> Any:
        frames = self._guard.outgoing(self._rank, self._route, list(frames), self._stock)
        return self._stock.send_multipart(frames, *args, **kwargs)


def rank_of(bootstrap_info: dict[str, Any]) -> str:
    """How this decode addresses a prefill rank: `"ip:port"`."""
    return f"{bootstrap_info['rank_ip']}:{bootstrap_info['rank_port']}"
