"""How much may be held before decode stops taking more requests in.

An ordinary hold lasts a message round trip and the rest of one write. Only what is
older counts here: a hold that will not end by itself takes from the pool for good.

    held, up to GRACE_S     drains on its own; costs the slots truly in flight
    held for longer       quarantined; bounded by --safe-reclaim-max-held
      past the bound      new requests: 503, Retry-After; and a fence, if allowed
      for a gone writer   a fence below the bound as well, when it costs little
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GRACE_S = 5.0
"""Seconds a hold may last before it counts: the longest wait between two questions."""
RETRY_AFTER_S = 5
"""Seconds, in the header of a refusal: the time in which a hold may end or a fence fall."""
MAX_METADATA_SHARE = 0.5
"""Of the metadata slots; there are few, and a transfer needs one whatever its length."""


IDLE_AFTER_S, AT_LATEST_S = 30.0, 600.0
"""Seconds a hold waits for a writer that is gone: until nothing is in flight, and at most."""


@dataclass(frozen=True)
class Hold:
    """One given-up exposure: age in seconds, token slots withheld, has it a metadata slot."""

    age: float
    tokens: int
    metadata: bool
    unproven: int = 0
    """Writers whose proof is missing."""
    gone: int = 0
    """Of them those that are gone: no proof will come from them but by a fence."""


@dataclass(frozen=True)
class Pressure:
    """What one rank would do; the ranks agree before any of them does it."""

    refuse: bool
    fence: bool


@dataclass(frozen=True)
class Quarantine:
    """The bound of one decode rank: `tokens` and `metadata` slots in all, share allowed."""

    tokens: int
    metadata: int
    max_held: float

    def decide(self, holds: Sequence[Hold], *, flying: int, may_fence: bool | None) -> Pressure:
        """Is too much held, and is a fence called for?

        `flying`: the transfers that a fence would end. `may_fence`: also for a writer that is
        not gone; None: there is no fence here at all.
        """
        refuse = self.over(holds)
        if may_fence is None:
            return Pressure(refuse, fence=False)
        old = [hold for hold in holds if hold.age > GRACE_S]
        gone = [hold.age for hold in old if hold.gone]
        if refuse:
            asked_for = may_fence and any(hold.unproven for hold in old)
            return Pressure(refuse, fence=bool(gone) or asked_for)
        # Below the bound: no other proof will come from a writer that is gone.
        oldest = max(gone, default=0.0)
        return Pressure(refuse, fence=oldest > (AT_LATEST_S if flying else IDLE_AFTER_S))

    def over(self, holds: Iterable[Hold]) -> bool:
        """True when what is held for longer than GRACE_S exceeds the bound."""
        old = [hold for hold in holds if hold.age > GRACE_S]
        return self.max_held < 1.0 and (
            sum(hold.tokens for hold in old) > self.max_held * self.tokens
            or sum(hold.metadata for hold in old) > MAX_METADATA_SHARE * self.metadata
        )
