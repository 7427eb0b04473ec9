"""Destinations that decode sent: the writers that may reach them, and the life they have.

The life of an exposure is `TRANSITIONS`. What an answer about it is worth is `CREDENCE`.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from sglang_scaling_fixes.reclaim.rules.types import LedgerError, Proof, Rank, Verdict


class ExposureState(enum.StrEnum):
    """Where an exposure stands on the decode side."""

    EXPOSED = "exposed"
    LANDED = "landed"
    HELD = "held"
    PROVEN = "proven"
    RETURNED = "returned"

    __hash__ = str.__hash__  # an enumeration's own is slow, and looked up for each request


TRANSITIONS: dict[tuple[ExposureState, str], ExposureState] = {
    (ExposureState.EXPOSED, "landed"): ExposureState.LANDED,
    (ExposureState.EXPOSED, "gave up, a writer unproven"): ExposureState.HELD,
    (ExposureState.EXPOSED, "gave up, every writer proven"): ExposureState.PROVEN,
    (ExposureState.HELD, "last writer proven"): ExposureState.PROVEN,
    (ExposureState.PROVEN, "every TP rank agrees"): ExposureState.RETURNED,
}
"""The whole life of an exposure. Anything else is a `LedgerError`."""


class Speaker(enum.StrEnum):
    """Who answers, seen from the process that has or had the destinations."""

    SAME = "the process that has them"
    UNKNOWN = "nobody knows who has them"
    OTHER = "another process"


CREDENCE: dict[tuple[Verdict, Speaker], bool] = {
    ("drained", Speaker.SAME): True,
    # Only a process that received the destinations says "drained".
    ("drained", Speaker.UNKNOWN): True,
    # A successor knows nothing of its predecessor's writes.
    ("drained", Speaker.OTHER): False,
    ("unknown", Speaker.SAME): True,
    ("unknown", Speaker.UNKNOWN): False,
    ("unknown", Speaker.OTHER): False,
    # It lives, and has not ended.
    ("writing", Speaker.SAME): False,
    ("writing", Speaker.UNKNOWN): False,
    ("writing", Speaker.OTHER): False,
    ("poisoned", Speaker.SAME): False,
    ("poisoned", Speaker.UNKNOWN): False,
    ("poisoned", Speaker.OTHER): False,
}
"""Does this answer prove that the writer writes no more? Never where the writer is disputed."""


@dataclass(slots=True)
class Writer:
    """One prefill rank that may write into an exposure's slots."""

    rank: Rank
    incarnation: str | None = None
    """A process that served the rank before the destinations were sent, when known."""
    hello: int = 0
    """Number of the Hello that went ahead of them on the same socket, 0 without one."""
    bound_by: str | None = None
    """The process that said it received them."""
    disputed: bool = False
    """Two processes may have received the same destinations: only a fence proves it."""
    sent: bool = False
    reported: bool = False
    """It reported success of this lease."""
    proof: Proof | None = None
    stuck: str = ""
    """Why an answer did not prove anything, for the operator. Empty: no answer yet."""
    poisoned: bool = False
    """A write of it failed, and may still land."""
    writes_at: float = 0.0
    """When it last said that it is still writing (seconds, monotonic), 0 if never."""
    ended: tuple[str, Verdict, str] | None = None
    """It ended the request while the owner waited: which process, its verdict and its reason."""
    aborts: int = 0
    next_abort: float = 0.0

    @property
    def meant_for(self) -> str | None:
        """The process that has or had the destinations, as far as anybody knows.

        One that decode named in them does not confirm them; any other says so.
        """
        return self.bound_by or self.incarnation

    @property
    def known(self) -> bool:
        """It ran safe reclaim when it had the destinations."""
        return bool(self.incarnation or self.bound_by or self.reported)

    def speaker(self, incarnation: str) -> Speaker:
        """Who says something about this writer's destinations."""
        if self.meant_for is None:
            return Speaker.UNKNOWN
        return Speaker.SAME if self.meant_for == incarnation else Speaker.OTHER

    def proven_by(self, incarnation: str, verdict: Verdict) -> bool:
        """Does this answer of this process prove that nothing more is written?"""
        credible = CREDENCE.get((verdict, self.speaker(incarnation)), False)
        return credible and not self.disputed

    def weigh(self, incarnation: str, verdict: Verdict, reason: str) -> bool:
        """`proven_by`; if it does not prove that, the operator learns why."""
        proven = self.proven_by(incarnation, verdict)
        if not proven and verdict == "poisoned":
            self.poisoned = True
            self.stuck = f"a write failed and may still land ({reason})"
        elif not proven and verdict != "writing":
            self.stuck = "it cannot vouch for the process that may have had the destinations"
        return proven


@dataclass(slots=True)
class Exposure:
    """Destinations of one attempt, as decode sent them."""

    lease: str
    attempt_id: str
    """Common to all TP ranks of this decode for this attempt; `lease` is this rank's own."""
    room: int
    writers: dict[Rank, Writer]
    engine: int = 0
    """Which of decode's receiving engines its destinations name, the latest if several."""
    prefill: str = ""
    """The prefill instance that its request names, as the adapter writes it."""
    state: ExposureState = ExposureState.EXPOSED
    gave_up_at: float = 0.0
    untagged: set[Hashable] = field(default_factory=set)
    """Prefill ranks, as stock numbers them, whose success of it was admitted without a mark."""
    late: set[Hashable] = field(default_factory=set)
    """The same, whose success of the room came before or after its owner gave up."""
    slots: Any = None
    """What the adapter keeps with it: the slots, and the frees withheld."""
    tokens: int = 0
    """Token slots that the adapter withholds, once the owner gave up."""
    metadata: bool = False
    """Whether it withholds a metadata slot then."""
    waits: tuple[Any, ...] | None = None
    """What it waits for (`causes`), None: to be found anew. Whoever changes a writer of a held
    exposure sets it to None."""
    last_word: float = 0.0
    """When its owner gave up or, if that was later, the quietest of its unproven writers said that
    it writes (seconds, monotonic). Found with `waits`."""
    blames: bool = False
    """This rank holds its prefill instance to be ailing, see `quarantine.Hold.blames`."""
    stands: bool = False
    """It does not drain, as far as this rank can tell, see `quarantine.Hold.stands`."""

    @property
    def unproven(self) -> list[Writer]:
        return [w for w in self.writers.values() if w.proof is None]

    @property
    def given_up(self) -> bool:
        return self.state in (ExposureState.HELD, ExposureState.PROVEN)

    def move(self, event: str) -> None:
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise LedgerError(f"{self.lease}: {event!r} in state {self.state}") from None

    def snapshot(self, now: float) -> Hashable:
        """All that decides what becomes of it, and whether a writer is asked at `now`."""
        told = (tuple(sorted(told, key=str)) for told in (self.untagged, self.late))
        writers = tuple(
            (
                w.rank,
                w.incarnation,
                w.hello,
                w.bound_by,
                w.disputed,
                w.sent,
                w.reported,
                w.proof,
                bool(w.stuck),
                w.poisoned,
                w.ended and w.ended[:2],
                w.proof is None and w.next_abort > now,
            )
            for w in self.writers.values()
        )
        return (self.lease, self.attempt_id, self.room, self.engine, self.state, *told, writers)

    def prove(self, writer: Writer, proof: Proof) -> None:
        """This writer of a held exposure can no longer write."""
        writer.proof, self.waits = proof, None
        if not self.unproven:
            self.move("last writer proven")
