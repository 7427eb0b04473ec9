"""Requests that end on prefill without success, as stock's scheduler shows it.

Decode is told of each (`messages.AttemptEnded`), whatever ended it. Stock has no single place
where a request ends, so all these are looked at. All run on the scheduler thread.

    sender.abort()            an abort, in whichever queue the request is
    sender.clear()            a failure: of the transfer, of the bootstrap, a time-out
    taken from waiting_queue  up to 0.5.20 some paths neither abort nor clear the sender
    no sender was made        the request was rejected: longer than the KV pool, say
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from sglang_scaling_fixes.kv_poll import FAILED
from sglang_scaling_fixes.reclaim.prefill.actions import Actions
from sglang_scaling_fixes.reclaim.rules.prefill_ledger import PrefillLedger

ABORTED = "aborted on prefill"


class RequestEnds:
    """What one prefill rank's ledger hears of them."""

    def __init__(
        self, manager: Any, ledger: PrefillLedger, lock: threading.Lock, actions: Actions
    ) -> None:
        self._manager = manager
        self._ledger = ledger
        self._lock = lock
        self._actions = actions

    def stopped(self, sender: Any, why: str = ABORTED) -> None:
        """Stock ended the request of this sender. It may have ended before."""
        ticket = getattr(sender, "sglang_scaling_fixes_ticket", None)
        if ticket is None:  # stock's fake transfers have none
            return
        with self._lock:
            actions = self._ledger.stopped(ticket.key, ticket.room, time.monotonic(), why)
        self._actions.act(actions)

    def clearing(self, sender: Any) -> None:
        """Stock is about to clear the sender, after a success or a failure."""
        room = sender.bootstrap_room
        states = sender.conclude_state, self._manager.request_status.get(room)
        if FAILED in states:
            recorded = getattr(self._manager, "failure_records", {}).get(room)
            self.stopped(sender, str(recorded or "failed on prefill"))

    def left(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        """Stock aborted requests of its waiting queue: those that are no longer in it."""
        kept = {id(request) for request in after}
        for request in before:
            if id(request) not in kept:
                self.stopped(getattr(request, "disagg_kv_sender", None))

    def admitted(self, request: Any) -> None:
        """Stock took a request in, or rejected it: then it has no sender."""
        room = request.bootstrap_room
        if room is None or getattr(request, "disagg_kv_sender", None) is not None:
            return
        end = request.finished_reason or request.to_finish
        why = str(getattr(end, "message", None) or "rejected on prefill")
        with self._lock:
            actions = self._ledger.rejected(room, time.monotonic(), why)
        self._actions.act(actions)

    def given_up(self, room: int) -> None:
        """Decode's stock says that it gave the room's request up: no destinations will come."""
        with self._lock:
            self._ledger.ended_rooms.forget(room)
