"""What a prefill rank's report of success is worth: for stock's eyes, and as proof (P3).

Stock's message names the room only, and stock counts successes by room. So one of an earlier
attempt could be taken for the present one's. Ranks with safe reclaim mark theirs with the
lease; without a mark a success counts only where the room cannot be confused.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from sglang_scaling_fixes.reclaim.rules.causes import Wait
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState, Writer
from sglang_scaling_fixes.reclaim.rules.types import Proof, Rank

if TYPE_CHECKING:
    from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger


class Successes:
    """Reports of success to one decode rank, beside the ledger of its exposures."""

    def __init__(self, ledger: DecodeLedger) -> None:
        self._ledger = ledger

    def reports(
        self, room: int, lease: str | None = None, rank: Rank = "", reporter: Hashable = None
    ) -> bool:
        """A prefill rank reports success of `room`. May stock be told?

        Marked: `rank` says that it is of lease `lease`. Unmarked: `reporter` is the rank as
        stock numbers it. Either may prove an exposure whose owner gave up meanwhile.
        """
        if lease is not None:
            self.tagged(lease, rank)
        else:
            self.stock_success(room, reporter)
        return self.admits(room, lease, reporter)

    def admits_metadata(self, room: int, lease: str | None, *, owned: bool) -> bool:
        """May stock write the content of a metadata slot that a prefill rank sent by message?

        Not a late copy, into a slot that is no longer this room's (`owned`) or this attempt's.
        """
        return owned and (lease is None or self.admits(room, lease))

    def admits(self, room: int, lease: str | None, reporter: Hashable = None) -> bool:
        """May stock be told that a prefill rank reports success of `room`?

        Stock's message names no lease, so a late one would be taken for the
        next attempt's. Prefill ranks with safe reclaim mark theirs; without a mark
        the message counts only where the room cannot be confused. `reporter`: the
        prefill rank as stock numbers it.
        """
        waiting = self._ledger.waiting(room)
        if lease is not None:
            return any(e.lease == lease for e in waiting)
        if self._ledger.given_up(room) is not None:
            return False
        if waiting and all(r in self._ledger.peers for r in waiting[-1].writers):
            return False
        for exposure in waiting[-1:]:
            exposure.untagged.add(reporter)
        return True

    def tagged(self, lease: str, rank: Rank) -> None:
        """`rank` reports success of `lease`: P3 for it, if the owner gave up meanwhile."""
        exposure = self._ledger.find(lease)
        if exposure is None or (writer := exposure.writers.get(rank)) is None:
            return
        writer.reported = True
        if exposure.state is ExposureState.HELD and writer.proof is None:
            exposure.prove(writer, Proof.LANDED)

    def stock_success(self, room: int, reporter: Hashable) -> bool:
        """An untagged success of a room whose owner gave up: P3 from a rank without safe reclaim.

        Stock prefill of old releases never learns of the abort and reports success
        when its write has landed. True when it proved the exposure.
        """
        for exposure in self._ledger.of_room(room):
            if exposure.given_up:
                exposure.late.add(reporter)
        found, unproven = self._by_stocks_word(room)
        if found is None or len(found.late) < len(found.writers):
            return False
        return self._prove_all(found, unproven, Proof.LANDED)

    def stock_acked(self, room: int, ranks: int) -> bool:
        """Stock's own acknowledgement of an abort, by now from `ranks`: P2 without safe reclaim.

        Only for an operator who trusts it. True when it proved the exposure.
        """
        found, unproven = self._by_stocks_word(room)
        if found is None or ranks < len(found.writers):
            return False
        return self._prove_all(found, unproven, Proof.DRAINED)

    def _by_stocks_word(self, room: int) -> tuple[Exposure | None, list[Writer]]:
        """The exposure that stock's word for a room can prove, with its unproven writers.

        All writers must have given it. A room that was given up before, or is exposed
        again, proves nothing: the word names no lease. Nor does it where a rank
        with safe reclaim is unproven: that one can be asked.
        """
        found = self._ledger.of_room(room)
        if len(found) != 1 or found[0].state is not ExposureState.HELD:
            return None, []
        (exposure,) = found
        unproven = exposure.unproven
        confusable = self._ledger.given_up(room) != exposure.lease
        if confusable or any(self.runs_plugin(w) for w in unproven):
            return None, []
        return exposure, unproven

    @staticmethod
    def _prove_all(exposure: Exposure, writers: list[Writer], proof: Proof) -> bool:
        for writer in writers:
            exposure.prove(writer, proof)
        return True

    def runs_plugin(self, writer: Writer | Wait) -> bool:
        """It runs safe reclaim, or did when it had these destinations."""
        return writer.rank in self._ledger.peers or writer.known
