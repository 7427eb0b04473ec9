"""What a hold costs, and whom: only what it holds, and only those who use the ailing writer.

    a hold drains    its writer answered a moment ago        costs its slots, for as long
    it stands        no word for GRACE_S, or a failed        requests that name this prefill are
                     write, or the writer is gone            refused, and others go on
    it is hopeless   only a fence can end it                 a fence, as often as its price allows
    the rest of the pool cannot carry work any more          every new request is refused

A prefill that writes slowly says "writing" whenever it is asked: it is not ailing. What stands
is counted against --safe-reclaim-max-held, and past it this decode refuses everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GRACE_S = 5.0
"""Seconds without a word of the writer before a hold stands. More than twice the longest wait
between two questions."""
RETRY_AFTER_S = 5
"""Seconds, in the header of a refusal: the time in which a hold may end or a fence fall."""
MAX_METADATA_SHARE = 0.5
"""Of the metadata slots; there are few, and a transfer needs one whatever its length."""
FENCE_SHARE = 0.02
"""Most of its time that a decode may spend on fences: one that took 0.1 s, and 5 s before the
next. A writer that fails again and again is then refused for most of the time."""


@dataclass(frozen=True)
class Hold:
    """Given-up exposures that are judged alike, as one rank sees them: they wait for the same."""

    quiet_s: float
    """Seconds since the owner gave up, or since a writer without proof said that it writes: of
    the quietest."""
    tokens: int
    """Token slots withheld."""
    metadata: int
    """Metadata slots withheld."""
    unproven: int = 0
    """Writers whose proof is missing."""
    poisoned: int = 0
    """Of them those with a write that failed and may still land."""
    gone: int = 0
    """Of them those whose process is no more, and nobody serves in its place."""
    replaced: int = 0
    """Of them those whose process is no more, and another serves in its place."""
    succeeded: int = 0
    """Of the others those whose rank another process has answered for."""
    back: bool = False
    """The prefill instance takes connections again: some process serves in place of the gone."""
    mute: int = 0
    """Of them those without the plugin: they cannot be asked, and stock may tell nothing."""
    fencing: bool = False
    """The engine that its destinations name is being retired already."""

    @property
    def hopeless(self) -> bool:
        """No proof will come but by a fence."""
        return bool(self.poisoned or self.gone or self.replaced) or self._unasked

    @property
    def _unasked(self) -> bool:
        """From 0.5.13 on a stock prefill sends nothing of a room it has stopped at."""
        return bool(self.mute) and self.quiet_s > GRACE_S

    @property
    def stands(self) -> bool:
        """It does not drain, as far as anybody can tell."""
        return bool(self.unproven) and (self.hopeless or self.quiet_s > GRACE_S)

    @property
    def blames(self) -> bool:
        """A new request of this prefill would fare no better.

        A successor is not blamed for its predecessor, and a stock prefill not for being stock.
        Once a new engine receives, a failed write of before says nothing of the next: stock's
        prefill shuns the old session only.
        """
        if (self.gone and not self.back) or (self.poisoned and not self.fencing):
            return True
        said = self.replaced + self.poisoned + self.mute + self.gone + self.succeeded
        return self.unproven > said and self.quiet_s > GRACE_S


@dataclass(frozen=True)
class Pressure:
    """What one rank would do; the ranks agree before any of them does it."""

    refuse: bool
    """Every new request, whatever prefill it names."""
    fence: bool


@dataclass(frozen=True)
class Quarantine:
    """The bound of one decode rank: `tokens` and `metadata` slots in all, share allowed."""

    tokens: int
    metadata: int
    max_held: float

    def decide(self, holds: Sequence[Hold], *, mode: str) -> Pressure:
        """Is too much held, and is a fence called for? `mode`: that of --safe-reclaim-fence."""
        if mode == "off":
            wanted = False
        else:
            wanted = any(
                hold.hopeless or (mode == "always" and hold.stands)
                for hold in holds
                if hold.unproven and not hold.fencing
            )
        return Pressure(refuse=self.over(holds), fence=wanted)

    def over(self, holds: Iterable[Hold]) -> bool:
        """True when what stands exceeds the bound."""
        standing = [hold for hold in holds if hold.stands]
        return self.max_held < 1.0 and (
            sum(hold.tokens for hold in standing) > self.max_held * self.tokens
            or sum(hold.metadata for hold in standing) > MAX_METADATA_SHARE * self.metadata
        )
