"""Decode's receive thread: sort out what is ours, and keep from stock what is not its to see.

A receive thread must outlive whatever arrives: what is not readable is dropped and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.peers import Peers
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.retry_after import ENDED
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.stock_aborts import StockAborts
from sglang_scaling_fixes.reclaim.stock_wire import AUX_DATA, is_success

Word = messages.HelloAck | messages.AbortAck | messages.AttemptEnded
"""What travels alone, on our own socket."""


class Inbox:
    """What prefill ranks say to one decode rank."""

    def __init__(
        self,
        records: Records,
        peers: Peers,
        owns_aux: Callable[[int, int], bool],
        stock_reads: Callable[[list[bytes]], bool],
        end_room: Callable[[int, str], None],
    ) -> None:
        self._ledger = records.ledger
        self._lock = records.lock
        self._metrics = records.metrics
        self._stock_aborts = records.stock_aborts
        self._peers = peers
        self._owns_aux = owns_aux
        self._stock_reads = stock_reads
        self._end_room = end_room

    def read(self, frames: list[bytes]) -> list[bytes] | None:
        """The frames for stock, None when the message was ours or must not reach it."""
        stock, message = messages.strip_trailer(frames)
        if message is messages.GARBAGE or not self._readable(stock, message):
            self._metrics.inc("garbage")
            return None
        if is_success(stock):
            mark = message if isinstance(message, messages.SuccessTag) else None
            return stock if self._admits(int(stock[0]), mark, stock[2]) else None
        if isinstance(message, Word):
            self._peers.heard(message.rank)
            with self._lock:
                self._take(message)
            return None
        if stock[0] == b"ABORT_ACK" and self._stock_aborts is not None:
            self._acked(self._stock_aborts, stock)
        if stock[0] == AUX_DATA and not self._takes_aux(stock, message):
            return None
        return stock

    def _readable(self, stock: list[bytes], message: messages.Message | None) -> bool:
        """Something a prefill rank says, as far as it is read here and by stock."""
        if isinstance(message, Word):
            return self._peers.knows(message.rank)
        tagged = isinstance(message, messages.SuccessTag)
        if not stock or (message is not None and not tagged):
            return False
        if tagged and not is_success(stock) and stock[0] != AUX_DATA:
            return False
        return self._stock_reads(stock)

    def _admits(self, room: int, mark: messages.SuccessTag | None, prefill_rank: bytes) -> bool:
        """A success: stock learns of it only if it is the open lease's."""
        lease, rank = (None, "") if mark is None else (mark.lease, mark.rank)
        if mark is not None:
            self._peers.heard(mark.rank)
        with self._lock:
            admitted = self._ledger.successes.reports(room, lease, rank, prefill_rank)
        if not admitted:
            self._metrics.inc("stale")
        return admitted

    def _take(self, message: Word) -> None:
        if isinstance(message, messages.HelloAck):
            self._ledger.hello_acked(message.rank, message.incarnation, message.lease, message.seq)
            return
        ended = isinstance(message, messages.AttemptEnded)
        heard = self._ledger.endings.told if ended else self._ledger.ack
        exposure = heard(
            message.rank,
            message.incarnation,
            message.lease,
            message.verdict,
            message.reason,
            now=time.monotonic(),
        )
        if exposure is None:
            self._metrics.inc("stale")
        elif not exposure.given_up:
            self._ended(exposure, message.reason)
        elif exposure.writers[message.rank].proof is not None:
            self._metrics.observe("ack_seconds", time.monotonic() - exposure.gave_up_at)

    def _ended(self, exposure: Exposure, reason: str) -> None:
        """Prefill ended a request whose owner waits. Under the lock: so long it is not cleared,
        and its room is no other request's."""
        if self._ledger.endings.fails(exposure):
            self._metrics.inc("endings")
            self._end_room(exposure.room, f"{ENDED} ({reason}): retry the request")

    def _acked(self, stock_aborts: StockAborts, frames: list[bytes]) -> None:
        """Stock's acknowledgement that a room has drained, believed under `stock-ack`."""
        if (acked := stock_aborts.acked(frames)) is not None:
            with self._lock:
                self._ledger.successes.stock_acked(*acked)

    def _takes_aux(self, stock: list[bytes], message: messages.Message | None) -> bool:
        room, aux = int(stock[1]), int(stock[3])
        lease = message.lease if isinstance(message, messages.SuccessTag) else None
        owned = self._owns_aux(aux, room)
        with self._lock:
            return self._ledger.successes.admits_metadata(room, lease, owned=owned)
