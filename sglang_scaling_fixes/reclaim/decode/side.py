"""Decode side: from stock SGLang's calls to the ledger's events, and back.

One `DecodeSide` per scheduler process. It is made with the KV manager, learns of exposures from
`send_metadata`, of endings from `clear`, and acts once per scheduler tick. Its parts:

    peers      the way to the prefill ranks               scheduler thread
    inbox      what comes from them                       stock's receive thread
    gate       withholds slots at the allocators          scheduler thread
    pressure   refuses requests, fences                   scheduler thread
    holds      the log, the gauges, /server_info          scheduler thread
    rooms      what each of two receivers of a room sees  scheduler thread

    scheduler        send_metadata -> expose     clear -> end
                     tick: questions out; proven exposures agreed among the TP ranks and given back
    receive thread   answers -> ledger; a success of another lease never reaches stock

Whatever changes the ledger does so under one lock. The scheduler thread reads without it what
only it changes: which exposures there are.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_scaling_fixes.alarm import end_server
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.kv_poll import SUCCESS
from sglang_scaling_fixes.metrics import of_process
from sglang_scaling_fixes.ranks import TpGroup
from sglang_scaling_fixes.reclaim import layout, stock_shapes
from sglang_scaling_fixes.reclaim.decode.gate import Gate, no_lock
from sglang_scaling_fixes.reclaim.decode.holds import HoldReport
from sglang_scaling_fixes.reclaim.decode.inbox import Inbox
from sglang_scaling_fixes.reclaim.decode.maintenance import Maintenance
from sglang_scaling_fixes.reclaim.decode.peers import Peers, rank_of
from sglang_scaling_fixes.reclaim.decode.pressure import Relief
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.decode.rooms import Rooms
from sglang_scaling_fixes.reclaim.interposers import ReceivingSocket
from sglang_scaling_fixes.reclaim.metrics import DECODE
from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState
from sglang_scaling_fixes.reclaim.rules.quarantine import Quarantine
from sglang_scaling_fixes.reclaim.rules.stock_aborts import StockAborts
from sglang_scaling_fixes.reclaim.transport import new_incarnation

logger = logging.getLogger(__name__)


class DecodeSide:
    """Safe reclaim of one decode rank."""

    current: DecodeSide | None = None
    """The one of this process: SGLang makes one KV manager per scheduler process."""

    def __init__(self, manager: Any, config: Config) -> None:
        layout.check_states(manager.kv_args)
        self._manager = manager
        self._config = config
        self.ledger = DecodeLedger(new_incarnation(), first_wait=config.resend)
        self.metrics = of_process(DECODE, manager)
        self._stock_aborts = StockAborts(config.resend) if config.peer == "stock-ack" else None
        records = Records(self.ledger, self.metrics, self._stock_aborts)
        self._lock = records.lock
        self.peers = Peers(manager, records)
        self.relief = Relief(manager, records, self.peers, mode=config.fence)
        reads = functools.partial(stock_shapes.decode_reads, manager)
        self.inbox = Inbox(records, self.peers, self._owns_aux, reads, self.relief.end_room)
        self.holds = HoldReport(records)
        self.rooms = Rooms(self._complete)
        self.maintenance: Maintenance | None = None
        """None until stock's preallocation queue exists."""
        self._group = TpGroup()
        self._buffers: Any = None
        self.gate: Gate | None = None
        self._quarantine: Quarantine | None = None

    # -- wiring ---------------------------------------------------------------

    def install(self) -> DecodeSide:
        """Read the manager's messages before stock does, and stand for this process."""
        manager = self._manager
        manager.server_socket = ReceivingSocket(manager.server_socket, self.inbox.read)
        DecodeSide.current = self
        return self

    def install_gate(self, queue: Any) -> None:
        """Wrap the allocators of stock's preallocation queue, once they exist."""
        self.rooms.watch(queue)
        allocator = queue.token_to_kv_pool_allocator
        layout.check_allocator(allocator)
        layout.check_shared_windows(self._manager)
        layout.rebind_captured(queue.tree_cache, allocator)
        metadata = queue.req_to_metadata_buffer_idx_allocator
        self.gate = Gate(allocator, metadata, audit=self._config.audit).install()
        self._quarantine = Quarantine(
            tokens=allocator.size,
            metadata=metadata.available_size(),
            max_held=self._config.max_held,
        )
        self._group = TpGroup(queue.gloo_group)
        self.ledger.group = self._group.of_first(self.ledger.group)
        self._buffers = queue.metadata_buffers
        self._longest_reserved = layout.longest_reserved()

    def protects(self, manager: Any) -> bool:
        """True when `manager` and its allocators are behind this side."""
        return self._manager is manager and self.gate is not None

    def _owns_aux(self, aux: int, room: int) -> bool:
        return self.gate is None or self.gate.owns_aux(aux, room)

    def refused(self, queue: Any, req: Any) -> bool:
        """End a request that is about to be admitted, if it must not be.

        Its half at prefill ends as well, unless the room is also that of a request that goes on.
        """
        assert self._quarantine is not None
        prefill, room = layout.prefill_of(req), req.bootstrap_room
        if (why := self.rooms.refusal(room)) is not None:
            self.relief.refuse(queue, req, *why)
            return True
        needs = layout.admission_tokens(queue, req, self._longest_reserved)
        why = self.relief.refusal(prefill, needs, self._quarantine.tokens)
        if why is None:
            return False
        self.relief.refuse(queue, req, *why)
        if self._group.first:
            self.peers.send_refusal(prefill, room)
        return True

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
        infos = receiver.bootstrap_infos or ()
        ranks = [rank_of(info) for info in infos if not info["is_dummy"]]
        prefill = getattr(receiver, "sglang_scaling_fixes_prefill", "")
        self.peers.serve(prefill, ranks)
        with self._lock:
            exposure = self.ledger.expose(receiver.bootstrap_room, ranks, prefill)
        shared = layout.page_states(self._manager.kv_args, state_indices)
        self.gate.exposed(exposure, kv_indices, shared, aux_index)
        self.metrics.inc("exposures")
        receiver.sglang_scaling_fixes_exposure = exposure
        if self._config.peer == "require" and not self.peers.all_run_plugin(ranks):
            self._refuse(receiver, ranks)
            return None
        if uninformed := self.peers.uninformed(rank_of(info) for info in infos):
            self.relief.end_room(
                receiver.bootstrap_room,
                f"prefill {', '.join(uninformed)} takes no messages and does not know this "
                "decode's session since it fenced its memory: retry the request",
            )
            return None
        tokens = getattr(receiver, "sglang_scaling_fixes_tokens", None)
        rejected = getattr(receiver, "sglang_scaling_fixes_rejected", None)
        came = getattr(receiver, "sglang_scaling_fixes_came", None)
        waited = 0.0 if came is None else time.monotonic() - came
        if rejected is not None and rejected():
            # Nothing is read for a request that is rejected: it keeps stock's own answer.
            bind = self.peers.bind(exposure, waited=waited)
        else:
            bind = self.peers.bind(
                exposure,
                len(kv_indices),
                layout.state_rows(self._manager.kv_args, state_indices),
                None if tokens is None else tokens(),
                waited,
            )
        if what := self.peers.unsayable(exposure, bind):
            self.metrics.inc("refusals", "unsayable")
            self.relief.end_room(
                receiver.bootstrap_room,
                f"safe-reclaim cannot say {what} to prefill; nothing was sent "
                "(a room is a number from 0 to 2**64 - 1)",
            )
            return None
        return self.peers.send_destinations(
            exposure, bind, lambda: stock(receiver, kv_indices, aux_index, state_indices, **kwargs)
        )

    def _refuse(self, receiver: Any, ranks: list[str]) -> None:
        silent = self.peers.without_plugin(ranks)
        self.metrics.inc("refusals", "peer")
        self.relief.end_room(
            receiver.bootstrap_room,
            f"prefill {', '.join(silent)} runs without safe-reclaim; start it with --plugin, "
            "or this decode with --safe-reclaim-peer hold",
        )

    # -- endings ------------------------------------------------------------------

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
        receiver.sglang_scaling_fixes_exposure = receiver.sglang_scaling_fixes_lock = None

    def _ended(self, receiver: Any, exposure: Exposure) -> None:
        assert self.gate is not None
        room = receiver.bootstrap_room
        success = self._manager.request_status.get(room) == SUCCESS
        with self._lock:
            committed = getattr(receiver, "sglang_scaling_fixes_commit", False)
            landed = self.ledger.end(
                exposure, time.monotonic(), committed=committed, success_seen=success
            )
            if not landed:
                lock = getattr(receiver, "sglang_scaling_fixes_lock", no_lock)
                self.gate.gave_up(exposure, lock)
                # Copied in one step: stock's receive thread adds to the set without our lock.
                reported = tuple(self._manager.prefill_response_tracker.get(room, ()))
                self.ledger.counted(exposure, (str(rank).encode() for rank in reported))
        if landed:
            self.gate.landed(exposure)
            self.metrics.inc("landed")
            return
        if self._stock_aborts is not None:
            self._stock_aborts.watch(room, len(receiver.bootstrap_infos or ()))
        self.metrics.inc("gave_up")
        self.peers.send_aborts(exposure.writers)

    # -- once per scheduler tick ---------------------------------------------------

    def tick(self) -> None:
        """Abort again, give back what is proven on every TP rank, refuse and fence as agreed."""
        if not self.ledger.holding and not self.relief.retiring:
            return
        assert self.gate is not None and self._quarantine is not None
        self.gate.settle()
        self.peers.send_aborts()
        with self._lock:
            held = self.ledger.held
            is_proven = ExposureState.PROVEN
            proven = [exposure.state is is_proven for exposure in held]
        mine = self.relief.assess(held, self._quarantine)
        # One collective: proof, and an engine that may go, must be on all ranks; pressure, blame
        # and the wish for a fence on one of them are enough.
        *returns, relaxed, no_switch, retire = self._group.all_true(
            [
                *proven,
                *[not exposure.blames for exposure in held],
                *[not exposure.stands for exposure in held],
                not mine.refuse,
                not self.relief.wants_switch(mine),
                self.relief.may_retire(),
            ]
        )
        count = len(held)
        blameless, draining = returns[count : 2 * count], returns[2 * count :]
        returns = returns[:count]
        agreed = [exposure for exposure, back in zip(held, returns, strict=True) if back]
        if agreed:
            self.holds.returned([(exposure, *self._give_back(exposure)) for exposure in agreed])
        blamed = [e for e, well in zip(held, blameless, strict=True) if not well]
        standing = [e for e, drains in zip(held, draining, strict=True) if not drains]
        self.relief.refuse_requests(not relaxed, blamed, standing, self.gate)
        if retire:
            self.relief.retire(self._group)
        elif not no_switch:
            self.relief.switch(self._group)
        self.holds.update(self.gate)
        if self._config.audit:
            self.check_integrity()
        if not self.ledger.holding:
            self.relief.refuse_requests(False, (), (), self.gate)
            self.holds.show(self.gate)

    def holding(self) -> bool:
        """True while the scheduler must not call itself idle."""
        if not self.ledger.holding:
            self.check_integrity()
        return self.ledger.holding

    def check_integrity(self) -> None:
        """Ledger and gate agree on every exposure, or this server ends: a slot may be lost."""
        if self.gate is None:
            return
        try:
            with self._lock:
                self.ledger.check_integrity()
                self.gate.check_integrity(self.ledger.exposures())
        except AssertionError as error:
            end_server(f"safe-reclaim: the records of this decode contradict each other: {error}")

    def _give_back(self, exposure: Exposure) -> tuple[int, int]:
        """Token slots that went back, and those that stock has not freed yet."""
        assert self.gate is not None
        aux = self.gate.metadata_slot(exposure)
        if aux is not None and hasattr(self._buffers, "clear_slot"):
            # Stock clears a metadata slot when it frees it; a write may have
            # landed in it since.
            self._buffers.clear_slot(aux)
        with self._lock:
            self.ledger.returned(exposure)
        if self._stock_aborts is not None:
            self._stock_aborts.forget(exposure.room)
        return self.gate.give_back(exposure)

    def report(self) -> dict[str, Any]:
        """Counters and holds for `/server_info` and the lab."""
        relief = self.relief
        return self.holds.report(self.gate, refusing=relief.refusing, ailing=relief.ailing)
