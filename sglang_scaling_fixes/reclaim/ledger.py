"""When may a KV slot be used again? Every rule of safe reclaim, and nothing else.

Two rules for this file: everything that decides whether a slot may be reused
lives here; and nothing here knows SGLang, sockets, threads or clocks. Events come
in as method calls (time as an argument, seconds of any monotonic clock), what to
do comes out as return values. The adapters translate; they decide nothing.

The invariant
-------------
A KV slot or metadata slot whose address was ever sent to a prefill rank does not
re-enter a free list until, for every such rank (a *writer*), one of these holds:

    P1  the destination was never sent to it
    P2  it acknowledged this room *and this generation* as drained: nothing of it
        is posted, nothing will be
    P3  it reported success of all its writes, and success means landed
    P4  a fence: it can no longer reach the memory

Theory of operation
-------------------
Each time decode sends destinations it opens an *exposure* with a generation that
is never used again, so a reused room cannot be confused with its predecessor.
Most exposures end in `landed`: KV arrived, the slots are ordinary from then on.
When the owner gives up first (abort, timeout, failure: whatever stock calls it),
the slots are withheld and every unproven writer is asked, again and again with
backoff, until it answers. Only then do the slots go back.

    decode                                   prefill
    ------                                   -------
    EXPOSED --- Bind(gen), destinations --->  bound
       |                                        | chunks: put, take, done
       |  owner gives up
       v
     HELD  ---------- Ask(gen) ------------->  closed: queued chunks are dropped,
       |   (repeated until answered)            | no new chunk is taken
       |                                        | the chunk in hand finishes
       |   <-------- Answer(drained) ---------  quiet
       v
    PROVEN -- every TP rank agrees --> RETURNED

On prefill the unit is an *attempt*: all destinations of one room that belong
together. It is `quiet` when no chunk of it is being processed and no helper task
of such a chunk is still running. Closing an attempt and taking a chunk are both
single calls, so a chunk is either taken before the close (and waited for) or
never taken.
"""

from __future__ import annotations

import enum
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from sglang_scaling_fixes.reclaim.messages import Rank


class Proof(enum.StrEnum):
    """Why a writer can no longer write. See the module docstring."""

    NEVER_SENT = "P1"
    DRAINED = "P2"
    LANDED = "P3"
    FENCED = "P4"


class State(enum.StrEnum):
    """Where an exposure stands on the decode side."""

    EXPOSED = "exposed"
    LANDED = "landed"
    HELD = "held"
    PROVEN = "proven"
    RETURNED = "returned"


TRANSITIONS: dict[tuple[State, str], State] = {
    (State.EXPOSED, "landed"): State.LANDED,
    (State.EXPOSED, "gave up, a writer unproven"): State.HELD,
    (State.EXPOSED, "gave up, every writer proven"): State.PROVEN,
    (State.HELD, "last writer proven"): State.PROVEN,
    (State.PROVEN, "every TP rank agrees"): State.RETURNED,
}
"""The whole life of an exposure. Anything else is a `LedgerError`."""


class LedgerError(AssertionError):
    """An event arrived that the table does not allow: a bug in an adapter."""


@dataclass
class Writer:
    """One prefill rank that may write into an exposure's slots."""

    rank: Rank
    incarnation: str | None
    """The process that served the rank when the destinations were sent, when known."""
    bound_by: str | None = None
    """The process that confirmed it received them."""
    sent: bool = False
    proof: Proof | None = None
    stuck: str = ""
    """Why an answer did not prove anything, for the operator. Empty: no answer yet."""
    asks: int = 0
    next_ask: float = 0.0


@dataclass
class Exposure:
    """Destinations of one attempt, as decode sent them."""

    gen: str
    room: int
    writers: dict[Rank, Writer]
    state: State = State.EXPOSED
    gave_up_at: float = 0.0

    @property
    def open(self) -> bool:
        """True while the slots are not ordinary: a writer may still reach them."""
        return self.state in (State.EXPOSED, State.HELD, State.PROVEN)

    @property
    def unproven(self) -> list[Writer]:
        return [w for w in self.writers.values() if w.proof is None]

    def move(self, event: str) -> None:
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise LedgerError(f"{self.gen}: {event!r} in state {self.state}") from None


@dataclass(frozen=True)
class SendAsk:
    """Action: send `Ask` for this generation to this rank."""

    rank: Rank
    room: int
    gen: str


class DecodeLedger:
    """The exposures of one decode rank.

    `first_wait` and `max_wait` (seconds) bound the backoff between two Asks to
    the same writer; it doubles each time.
    """

    def __init__(self, incarnation: str, *, first_wait: float = 0.1, max_wait: float = 5.0) -> None:
        self._incarnation = incarnation
        self._counter = itertools.count(1)
        self._first_wait = first_wait
        self._max_wait = max_wait
        self.peers: dict[Rank, str] = {}
        """Ranks known to run safe reclaim, with the process that said so."""
        self._exposed: dict[str, Exposure] = {}
        self._held: OrderedDict[str, Exposure] = OrderedDict()

    # -- events ---------------------------------------------------------------

    def here(self, rank: Rank, incarnation: str, gen: str | None = None) -> None:
        """A prefill process said it serves `rank` (and, with `gen`, that it bound it)."""
        self.peers[rank] = incarnation
        if gen is not None and (exposure := self._find(gen)) is not None:
            writer = exposure.writers.get(rank)
            if writer is not None:
                writer.bound_by = incarnation

    def expose(self, room: int, ranks: Iterable[Rank]) -> Exposure:
        """Destinations are about to be sent to `ranks`. Call before the first send."""
        gen = f"{self._incarnation}-{next(self._counter)}"
        writers = {rank: Writer(rank, self.peers.get(rank)) for rank in ranks}
        exposure = Exposure(gen, room, writers)
        self._exposed[gen] = exposure
        return exposure

    def sent(self, exposure: Exposure, rank: Rank) -> None:
        """The destinations are handed to the socket for `rank` (call before, not after)."""
        exposure.writers[rank].sent = True

    def landed(self, exposure: Exposure) -> None:
        """Every writer reported success and the owner takes the KV: P3 for all."""
        exposure.move("landed")
        for writer in exposure.writers.values():
            writer.proof = writer.proof or Proof.LANDED
        del self._exposed[exposure.gen]

    def give_up(self, exposure: Exposure, now: float, *, success_seen: bool = False) -> None:
        """The owner abandons the slots. They are withheld even if proof is already there.

        Whether a rank holds must follow from what all TP ranks share (the agreed
        failure), never from what this rank alone has seen; hence PROVEN, which
        still waits for agreement, rather than a release on the spot.
        `success_seen`: this rank had every writer's success before the failure.
        """
        for writer in exposure.writers.values():
            if not writer.sent:
                writer.proof = Proof.NEVER_SENT
            elif success_seen:
                writer.proof = writer.proof or Proof.LANDED
            writer.next_ask = now
        exposure.gave_up_at = now
        exposure.move(
            "gave up, a writer unproven" if exposure.unproven else "gave up, every writer proven"
        )
        del self._exposed[exposure.gen]
        self._held[exposure.gen] = exposure

    def answer(
        self, rank: Rank, incarnation: str, gen: str, verdict: str, reason: str = ""
    ) -> None:
        """A prefill rank answered an Ask. Late, repeated and foreign answers change nothing."""
        exposure = self._held.get(gen)
        writer = exposure.writers.get(rank) if exposure is not None else None
        if exposure is None or writer is None or writer.proof is not None:
            return
        if verdict == "poisoned":
            writer.stuck = f"a write failed and may still land ({reason})"
            return
        if verdict == "drained":
            # Only a process that received these destinations says "drained".
            credible = writer.bound_by in (None, incarnation)
        else:
            # "unknown" proves something only from the process that received them or
            # would have: a successor knows nothing of its predecessor's writes.
            credible = verdict == "unknown" and incarnation == (
                writer.bound_by or writer.incarnation
            )
        if credible:
            self._prove(exposure, writer, Proof.DRAINED)
        else:
            writer.stuck = "the prefill process that had the destinations was replaced"

    def success(self, room: int, ranks_reporting: int) -> bool:
        """A room's success arrived after its owner gave up, from a rank without safe reclaim.

        Stock prefill of old releases never learns of the abort and reports
        success when its write has landed: P3. `ranks_reporting` counts distinct
        prefill ranks so far; all writers must have reported. A room with more
        than one open generation proves nothing: the message names no generation.
        Returns True when it proved the exposure.
        """
        open_gens = [e for e in self.exposures() if e.room == room]
        if len(open_gens) != 1 or open_gens[0].state is not State.HELD:
            return False
        exposure = open_gens[0]
        unproven = exposure.unproven
        if any(w.rank in self.peers for w in unproven) or ranks_reporting < len(exposure.writers):
            return False
        for writer in unproven:
            self._prove(exposure, writer, Proof.LANDED)
        return True

    def fenced(self, gen: str, rank: Rank) -> None:
        """The writer can no longer reach this memory (P4)."""
        exposure = self._held.get(gen)
        writer = exposure.writers.get(rank) if exposure is not None else None
        if exposure is not None and writer is not None and writer.proof is None:
            self._prove(exposure, writer, Proof.FENCED)

    def returned(self, exposure: Exposure) -> None:
        """Every TP rank agreed; the adapter puts the slots back right after this call."""
        exposure.move("every TP rank agrees")
        del self._held[exposure.gen]

    def tick(self, now: float) -> list[SendAsk]:
        """Questions that are due. Only ranks that speak safe reclaim are asked."""
        due: list[SendAsk] = []
        for exposure in self._held.values():
            for writer in exposure.unproven:
                if writer.rank in self.peers and writer.next_ask <= now:
                    wait = min(self._max_wait, self._first_wait * 2.0 ** min(writer.asks, 30))
                    writer.asks += 1
                    writer.next_ask = now + wait
                    due.append(SendAsk(writer.rank, exposure.room, exposure.gen))
        return due

    # -- queries --------------------------------------------------------------

    @property
    def held(self) -> list[Exposure]:
        """Given-up exposures in the order the owners gave up: the same on every TP rank."""
        return list(self._held.values())

    @property
    def holding(self) -> bool:
        return bool(self._held)

    def exposures(self) -> list[Exposure]:
        """Every exposure whose slots are not ordinary."""
        return [*self._exposed.values(), *self._held.values()]

    def why_held(self, exposure: Exposure) -> str:
        """One line for the operator: what this exposure waits for."""
        if not exposure.unproven:
            return "proven on this rank; waiting for the other TP ranks"
        parts = []
        for writer in exposure.unproven:
            if writer.stuck:
                parts.append(f"{writer.rank}: {writer.stuck}")
            elif writer.rank not in self.peers:
                parts.append(f"{writer.rank}: runs without safe-reclaim, cannot be asked")
            else:
                parts.append(f"{writer.rank}: asked {writer.asks} times, no answer yet")
        return "; ".join(parts)

    # -- internals ------------------------------------------------------------

    def _find(self, gen: str) -> Exposure | None:
        return self._exposed.get(gen) or self._held.get(gen)

    def _prove(self, exposure: Exposure, writer: Writer, proof: Proof) -> None:
        writer.proof = proof
        if not exposure.unproven:
            exposure.move("last writer proven")


# ------------------------------------------------------------------------------
# Prefill
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SendAnswer:
    """Action: send `Answer` to `reply_to`."""

    reply_to: str
    rank: Rank
    gen: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class FailRoom:
    """Action: mark the room failed in stock, so that its request ends and frees its KV."""

    room: int
    reason: str


Action = SendAnswer | FailRoom


class Delivery(enum.Enum):
    """What to do with a metadata message that carries a Bind."""

    DELIVER = "hand it to stock"
    DEFER = "keep it until the attempt before it is quiet"
    DROP = "its generation was aborted before it arrived"


@dataclass(eq=False)
class Attempt:
    """All destinations of one room that belong together, and what is being done with them."""

    room: int
    fan_in: int
    """How many decode ranks send destinations for this attempt."""
    bindings: dict[str, tuple[str, Rank]] = field(default_factory=dict)
    """gen -> (reply_to, rank). Empty for a decode without the plugin."""
    asked: set[str] = field(default_factory=set)
    active: int = 0
    """Chunks being processed plus their helper tasks."""
    closed: bool = False
    """No chunk of it is accepted or taken any more."""
    retired: bool = False
    """Stock forgot the room; remembered only until quiet."""
    poisoned: str = ""
    """A write failed in a way that may still land. Never cleared."""

    @property
    def quiet(self) -> bool:
        return self.active == 0

    def serves(self, reply_to: str) -> bool:
        return any(where == reply_to for where, _ in self.bindings.values())


class PrefillLedger:
    """The attempts of one prefill rank.

    `memory` bounds how many finished, quiet, unpoisoned attempts and how many
    never-seen aborted generations are remembered. Forgetting a finished one is
    safe: it is answered "unknown", which the same process may truthfully say.
    """

    def __init__(self, incarnation: str, *, memory: int = 65536) -> None:
        self.incarnation = incarnation
        self._memory = memory
        self._rooms: dict[int, Attempt] = {}
        self._by_gen: dict[str, Attempt] = {}
        self._finished: deque[Attempt] = deque()
        self._aborted_unseen: OrderedDict[str, None] = OrderedDict()

    # -- messages from decode ---------------------------------------------------

    def bind(self, room: int, gen: str, reply_to: str, rank: Rank, fan_in: int) -> Delivery:
        """Destinations of `gen` arrived. The verdict comes before stock sees them."""
        if gen in self._aborted_unseen:
            return Delivery.DROP
        if gen in self._by_gen:
            return Delivery.DROP  # a duplicate: stock has it already
        attempt = self._rooms.get(room)
        if attempt is not None and (
            attempt.serves(reply_to) or len(attempt.bindings) >= attempt.fan_in
        ):
            # The room is being reused. Stock keys destinations by room alone, so
            # a chunk of the old attempt would be written to the new destinations.
            if not attempt.quiet:
                return Delivery.DEFER
            self._finish(attempt)
            attempt = None
        if attempt is None:
            attempt = self._rooms[room] = Attempt(room, fan_in)
        attempt.bindings[gen] = (reply_to, rank)
        self._by_gen[gen] = attempt
        return Delivery.DROP if attempt.closed else Delivery.DELIVER

    def ask(self, room: int, gen: str, reply_to: str, rank: Rank) -> list[Action]:
        """The owner of `gen` gave up. Repeats are answered again: the answer may be lost."""
        attempt = self._by_gen.get(gen)
        if attempt is None:
            self._aborted_unseen[gen] = None
            if len(self._aborted_unseen) > self._memory:
                self._aborted_unseen.popitem(last=False)
            return [SendAnswer(reply_to, rank, gen, "unknown")]
        actions: list[Action] = []
        if not attempt.closed:
            attempt.closed = True
            actions.append(FailRoom(room, "aborted by the decode side"))
        attempt.bindings[gen] = (reply_to, rank)
        attempt.asked.add(gen)
        return [*actions, *self._answers(attempt)]

    # -- chunks -----------------------------------------------------------------

    def put(self, room: int) -> Attempt | None:
        """A chunk of `room` is about to be queued. None: drop it, its attempt is closed."""
        attempt = self._rooms.get(room)
        if attempt is None:
            # A decode without the plugin: nothing to gate, still accounted for.
            attempt = self._rooms[room] = Attempt(room, fan_in=1)
        return None if attempt.closed else attempt

    def take(self, attempt: Attempt) -> bool:
        """A worker is about to process a chunk. False: drop it."""
        if attempt.closed:
            return False
        attempt.active += 1
        return True

    def opened(self, attempt: Attempt) -> None:
        """A helper task of the chunk in hand was submitted (it may outlive the chunk)."""
        attempt.active += 1

    def done(self, attempt: Attempt) -> list[Action]:
        """A chunk or a helper task ended."""
        if attempt.active <= 0:
            raise LedgerError(f"room {attempt.room}: more ends than beginnings")
        attempt.active -= 1
        if attempt.retired and attempt.quiet:
            self._finish(attempt)
        return self._answers(attempt)

    def failed(self, attempt: Attempt, reason: str) -> None:
        """A write reported failure: it may still be running. The attempt is poisoned."""
        attempt.poisoned = attempt.poisoned or reason

    def retire(self, room: int) -> list[Action]:
        """Stock forgot the room (its sender was cleared): no chunk of it will come."""
        attempt = self._rooms.get(room)
        if attempt is None:
            return []
        attempt.closed = attempt.retired = True
        if attempt.quiet:
            self._finish(attempt)
        return self._answers(attempt)

    # -- queries ----------------------------------------------------------------

    def busy(self, room: int) -> bool:
        """True while a chunk of the room's current attempt may be reading source pages."""
        attempt = self._rooms.get(room)
        return attempt is not None and not attempt.quiet

    @property
    def poisoned(self) -> int:
        """Generations whose writes can no longer be proven drained by this process."""
        return sum(1 for a in self._by_gen.values() if a.poisoned)

    # -- internals ---------------------------------------------------------------

    def _answers(self, attempt: Attempt) -> list[Action]:
        if not (attempt.closed and attempt.quiet):
            return []
        verdict = "poisoned" if attempt.poisoned else "drained"
        answers: list[Action] = []
        for gen in sorted(attempt.asked):
            reply_to, rank = attempt.bindings[gen]
            answers.append(SendAnswer(reply_to, rank, gen, verdict, attempt.poisoned))
        attempt.asked.clear()
        return answers

    def _finish(self, attempt: Attempt) -> None:
        """Take the attempt off its room; remember it for late questions."""
        attempt.closed = True
        if self._rooms.get(attempt.room) is attempt:
            del self._rooms[attempt.room]
        if attempt.poisoned:
            return  # kept for good: forgetting it would turn "poisoned" into "unknown"
        self._finished.append(attempt)
        if len(self._finished) > self._memory:
            for gen in self._finished.popleft().bindings:
                self._by_gen.pop(gen, None)
