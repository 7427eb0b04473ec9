"""How much may be held before decode stops taking more requests in.

An ordinary hold lasts a message round trip and the rest of one write. Only what is
older counts here: a hold that will not end by itself takes from the pool for good.

    held, up to GRACE     drains on its own; costs the slots truly in flight
    held for longer       quarantined; bounded by --safe-reclaim-max-held
      past the bound      new requests: 503, Retry-After; and a fence, if allowed
      for a gone writer   a fence below the bound as well, when it costs little
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GRACE = 5.0
"""Seconds a hold may last before it counts: the longest wait between two questions."""
RETRY_AFTER = 5
"""Seconds, in the header of a refusal: the time in which a hold may end or a fence fall."""
MAX_METADATA_SHARE = 0.5
"""Of the metadata slots; there are few, and a transfer needs one whatever its length."""


IDLE_AFTER, AT_LATEST = 30.0, 600.0
"""Seconds a hold waits for a writer that is gone: until nothing is in flight, and at most."""


def worth_a_fence(oldest: float, flying: int) -> bool:
    """Whether to fence below the bound: no other proof will come from a writer that is gone.

    `oldest`: seconds the oldest such hold has lasted, 0 if there is none. `flying`: the
    transfers a fence would end.
    """
    return oldest > (AT_LATEST if flying else IDLE_AFTER)


@dataclass(frozen=True)
class Hold:
    """One given-up exposure: age in seconds, token slots withheld, has it a metadata slot."""

    age: float
    tokens: int
    metadata: bool


@dataclass(frozen=True)
class Quarantine:
    """The bound of one decode rank: `tokens` and `metadata` slots in all, share allowed."""

    tokens: int
    metadata: int
    max_held: float

    def over(self, holds: Iterable[Hold]) -> bool:
        """True when what is held for longer than GRACE exceeds the bound."""
        old = [hold for hold in holds if hold.age > GRACE]
        return self.max_held < 1.0 and (
            sum(hold.tokens for hold in old) > self.max_held * self.tokens
            or sum(hold.metadata for hold in old) > MAX_METADATA_SHARE * self.metadata
        )
