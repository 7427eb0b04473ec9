"""What it is worth to decode that prefill ended a request without success.

An ending is told unasked, so it may come while the owner still waits for its KV. Then the owner
waits in vain and is told. What the ending proves counts from when the owner has given up, for
this writer alone: it is weighed then, with all that is known by then of who had the destinations.

    ending            owner waits        the owner is failed; kept with the writer until it gives up
                      owner gave up      weighed at once, as the answer to an Abort
                      KV all landed      nothing: the writer reported success of this lease
                      another lease      nothing

It needs no answer of its own: a lost one costs what it would have saved. The owner then waits
for stock's time-out, and its Abort is answered as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.types import Rank, Verdict

if TYPE_CHECKING:
    from sglang_scaling_fixes.reclaim.rules.decode_ledger import DecodeLedger


class Endings:
    """Endings told to one decode rank, beside the ledger of its exposures."""

    def __init__(self, ledger: DecodeLedger) -> None:
        self._ledger = ledger

    def told(
        self,
        rank: Rank,
        incarnation: str,
        lease: str,
        verdict: Verdict,
        reason: str = "",
        *,
        now: float = 0.0,
    ) -> Exposure | None:
        """A prefill process ended the request of `lease`. Late and foreign ones change nothing.

        Returns the exposure it is about, None when it was one of those.
        """
        exposure = self._ledger.find(lease)
        if exposure is None or exposure.given_up:
            return self._ledger.ack(rank, incarnation, lease, verdict, reason, now=now)
        writer = exposure.writers.get(rank)
        if writer is None or writer.reported:
            return None
        writer.ended = incarnation, verdict, reason
        return exposure

    def fails(self, exposure: Exposure) -> bool:
        """Is the room to be failed in stock, for an exposure of which an ending was told?

        Stock keeps a failure by room. Two owners that wait in one room would both be failed.
        """
        return self._ledger.waiting(exposure.room) == [exposure]
