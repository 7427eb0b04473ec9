"""Destinations that prefill received for one attempt at a room, and the life they have.

The life of an attempt is `ATTEMPT_TRANSITIONS`. Apart from it, an attempt is *poisoned* from
the first write of it that failed: whatever phase it is in, no answer about it proves anything.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field

from sglang_scaling_fixes.reclaim.rules.coverage import Coverage, Extent
from sglang_scaling_fixes.reclaim.rules.prefill_actions import Action, SendAck, SendEnded
from sglang_scaling_fixes.reclaim.rules.types import EndVerdict, LedgerError, Rank

WITHOUT_PLUGIN = "without the plugin"
"""The attempt_id of every attempt by a decode without the plugin."""


class Phase(enum.StrEnum):
    """Where an attempt stands on the prefill side."""

    WAITING = "waiting"  # open; stock has no sender for it yet
    SERVED = "served"  # open; its sender may queue chunks
    DRAINING = "draining"  # closed; a chunk is still being written
    ABANDONED = "abandoned"  # the same, and stock is done with its sender
    CLOSED = "closed"  # closed; nothing is written; stock still looks at its sender
    OVER = "over"  # closed; nothing is written or looked at

    __hash__ = str.__hash__  # an enumeration's own is slow, and looked up for each request


_OPEN, _OVER = (Phase.WAITING, Phase.SERVED), Phase.OVER
_WRITTEN = (Phase.DRAINING, Phase.ABANDONED)
_WRITING, _QUIET = "a chunk in hand", "nothing in hand"

ATTEMPT_TRANSITIONS: dict[tuple[Phase, str], Phase] = {
    (Phase.WAITING, "sender made"): Phase.SERVED,
    (Phase.WAITING, f"closed, {_QUIET}"): Phase.OVER,
    (Phase.SERVED, f"closed, {_WRITING}"): Phase.DRAINING,
    (Phase.SERVED, f"closed, {_QUIET}"): Phase.CLOSED,
    (Phase.SERVED, f"sender gone, {_WRITING}"): Phase.ABANDONED,
    (Phase.SERVED, f"sender gone, {_QUIET}"): Phase.OVER,
    (Phase.DRAINING, f"sender gone, {_WRITING}"): Phase.ABANDONED,
    (Phase.DRAINING, "last chunk ended"): Phase.CLOSED,
    (Phase.ABANDONED, "last chunk ended"): Phase.OVER,
    (Phase.CLOSED, f"sender gone, {_QUIET}"): Phase.OVER,
    # The request came after its destinations were given up.
    (Phase.OVER, "sender made"): Phase.CLOSED,
}
"""The whole life of an attempt. Anything else is a `LedgerError`."""


@dataclass(eq=False, slots=True)
class Attempt:
    """All destinations of one attempt at a room, and what is being done with them."""

    room: int
    attempt_id: str
    """What the destinations of one attempt have in common, on all its decode ranks."""
    bindings: dict[str, tuple[str, Rank]] = field(default_factory=dict)
    """lease -> (reply_to, rank); of a decode without the plugin, its address twice."""
    exposed: dict[str, Extent] = field(default_factory=dict)
    """lease -> what its destinations stand for."""
    coverage: Coverage = field(default_factory=Coverage)
    short: str = ""
    """Why its success did not leave as one, see `coverage`."""
    awaiting_ack: set[str] = field(default_factory=set)
    untold: tuple[str, ...] = ()
    """Leases whose owners are told if it ends without a success for them."""
    ended: str = ""
    """Why it ended here. Empty while it is open, if decode ended it, and after a success."""
    reported: bool = False
    """A success of it has left."""
    phase: Phase = Phase.WAITING
    closed: bool = False
    """No chunk of it is accepted or taken any more: what its phase says, at hand."""
    closed_for: str = ""
    """Why it was closed, unless by the end of its sender."""
    over: bool = False
    """Nothing of it is being written, will be, or is still looked at by stock: the same."""
    sender: Hashable | None = None
    """Stock's sender of this attempt; its chunks, and no others, are this attempt's."""
    active: int = 0
    """Chunks being processed plus their helper tasks."""
    poisoned: str = ""
    """A write failed in a way that may still land. Never cleared."""

    @property
    def quiet(self) -> bool:
        return self.active == 0

    def says(self) -> list[Action]:
        """What decode is told of it, once it is closed and nothing of it is written."""
        if not (self.closed and self.quiet):
            return []
        said: list[Action] = []
        for lease in sorted(self.awaiting_ack):
            said.append(SendAck(*self.bindings[lease], lease, self.verdict, self.poisoned))
        self.awaiting_ack.clear()
        why = self.poisoned or self.ended or self.short
        for lease in self.untold:
            said.append(SendEnded(*self.bindings[lease], lease, self.verdict, why))
        self.untold = ()
        return said

    @property
    def sender_gone(self) -> bool:
        """Stock is done with its sender."""
        return self.sender is not None and self.phase in (Phase.ABANDONED, Phase.OVER)

    @property
    def verdict(self) -> EndVerdict:
        """What is answered about it once it is closed and quiet."""
        return "poisoned" if self.poisoned else "drained"

    def bind(
        self, lease: str, reply_to: str, rank: Rank, extent: Extent, *, listens: bool = False
    ) -> None:
        """Destinations of `lease` arrived, of a decode that is answered at `reply_to`.

        `listens`: it is to be told if the attempt ends without success.
        """
        self.bindings[lease] = (reply_to, rank)
        self.exposed[lease] = extent
        if listens and (self.ended or not self.closed):
            self.untold = (*self.untold, lease)

    def reports(self, to: str) -> None:
        """A success of it leaves for the decode rank at `to`."""
        self.reported = True
        if (found := self._bound_at(to)) is not None:
            self.untold = tuple(lease for lease in self.untold if lease != found[0])

    def exposed_at(self, to: str) -> Extent | None:
        """What the decode rank at `to` exposed to it."""
        found = self._bound_at(to)
        return None if found is None else self.exposed.get(found[0])

    def bound_at(self, to: str) -> tuple[str, Rank] | None:
        """Lease and rank of the owner at `to`, None without the plugin."""
        return None if self.attempt_id == WITHOUT_PLUGIN else self._bound_at(to)

    def _bound_at(self, to: str) -> tuple[str, Rank] | None:
        for lease, (address, rank) in self.bindings.items():
            if address == to:
                return lease, rank
        return None

    def adopt(self, sender: Hashable) -> None:
        """Stock's sender for it is there."""
        self._move("sender made")
        self.sender = sender

    def close(self, why: str = "") -> None:
        """No further chunk is accepted or taken. `why`: prefill ends it, and decode did not."""
        self._ends(why)
        self._move(f"closed, {_QUIET if self.quiet else _WRITING}")

    def lose_sender(self) -> None:
        """Stock is done with its sender; that closes it as well."""
        self._ends("its request ended on prefill")
        self._move(f"sender gone, {_QUIET if self.quiet else _WRITING}")

    def _ends(self, why: str) -> None:
        if not self.closed and not self.reported:
            self.ended = why

    def begin(self) -> None:
        """A chunk, or a helper task of the chunk in hand, is being processed."""
        self.active += 1

    def end(self) -> None:
        """A chunk or a helper task ended."""
        if self.active <= 0:
            raise LedgerError(f"room {self.room}: more ends than beginnings")
        self.active -= 1
        if self.quiet and self.phase in _WRITTEN:
            self._move("last chunk ended")

    def _move(self, event: str) -> None:
        try:
            self.phase = ATTEMPT_TRANSITIONS[self.phase, event]
        except KeyError:
            raise LedgerError(f"room {self.room}: {event!r} in phase {self.phase}") from None
        self.closed = self.phase not in _OPEN
        self.over = self.phase is _OVER
