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
        (and the writes were all that was exposed: see `coverage`)
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
together, and the one stock sender whose chunks go there. It is `quiet` when no
chunk of it is being processed and no helper task of such a chunk is still running.
Closing an attempt and taking a chunk are both single calls, so a chunk is either
taken before the close (and waited for) or never taken. A room serves one attempt
at a time; destinations of the next wait until the one before is `over`.

Assumed of the transport: messages from one decode rank to one prefill rank arrive
in order or not at all (one ZMQ PUSH socket each), and never twice.
"""

from __future__ import annotations

import enum
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from sglang_scaling_fixes.reclaim.coverage import Coverage, Extent
from sglang_scaling_fixes.reclaim.messages import Rank, Verdict


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
    """It reported success of this generation."""
    proof: Proof | None = None
    stuck: str = ""
    """Why an answer did not prove anything, for the operator. Empty: no answer yet."""
    asks: int = 0
    next_ask: float = 0.0

    @property
    def meant_for(self) -> str | None:
        """The process that has or had the destinations, as far as anybody knows.

        One that decode named in them does not confirm them; any other says so.
        """
        return self.bound_by or self.incarnation


@dataclass(slots=True)
class Exposure:
    """Destinations of one attempt, as decode sent them."""

    gen: str
    epoch: str
    """Common to all TP ranks of this decode for this attempt; `gen` is this rank's own."""
    room: int
    writers: dict[Rank, Writer]
    state: State = State.EXPOSED
    gave_up_at: float = 0.0
    unmarked: set[Hashable] = field(default_factory=set)
    """Prefill ranks, as stock numbers them, whose success of it was admitted without a mark."""

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
    again: bool = False
    """This rank was asked before."""


REASONS = ("no answer yet", "write of unknown end", "no safe-reclaim", "other TP ranks")
"""What a hold can wait for, in few words (`DecodeLedger.reason`)."""


class DecodeLedger:
    """The exposures of one decode rank.

    `first_wait` and `max_wait` (seconds) bound the backoff between two Asks to
    the same writer; it doubles each time.
    """

    def __init__(
        self,
        incarnation: str,
        *,
        first_wait: float = 0.1,
        max_wait: float = 5.0,
        memory: int = 65536,
    ) -> None:
        self._incarnation = incarnation
        self.group = incarnation
        """An identity all TP ranks share, once they have agreed on one."""
        self._counter = itertools.count(1)
        self._first_wait = first_wait
        self._max_wait = max_wait
        self.peers: dict[Rank, str] = {}
        """Ranks known to run safe reclaim, with the process that said so."""
        self._hellos: dict[Rank, int] = {}
        """Rank -> the number of the last Hello sent to it."""
        self._exposed: dict[str, Exposure] = {}
        self._held: OrderedDict[str, Exposure] = OrderedDict()
        self._given_up_rooms: OrderedDict[int, str] = OrderedDict()
        """Room -> the generation given up, empty when more than one was: the last
        `memory` rooms. A room in here may still get a success of the old attempt."""
        self._memory = memory

    # -- events ---------------------------------------------------------------

    def hello(self, rank: Rank) -> int:
        """Decode registers with `rank` anew: the number its Hello carries.

        Call under the lock of the socket, right before the Hello goes out. Who
        serves the rank is not known until it says so.
        """
        self.peers.pop(rank, None)
        self._hellos[rank] = self._hellos.get(rank, 0) + 1
        return self._hellos[rank]

    def here(
        self, rank: Rank, incarnation: str, gen: str | None = None, seq: int | None = None
    ) -> None:
        """A prefill process said it serves `rank`.

        With `gen` it bound that generation; with `seq` it received that Hello.
        """
        exposure = self._find(gen) if gen is not None else None
        writer = exposure.writers.get(rank) if exposure is not None else None
        number = seq or (writer.hello if writer is not None else 0)
        if number in (0, self._hellos.get(rank, 0)):  # later Hellos: it may be gone by now
            self.peers[rank] = incarnation
        if seq:
            self._served_before(rank, incarnation, seq)
        if writer is not None:
            # Meant for one process, received by another: the first may have them as well.
            writer.disputed |= writer.meant_for not in (None, incarnation)
            writer.bound_by = writer.bound_by or incarnation

    def _served_before(self, rank: Rank, incarnation: str, seq: int) -> None:
        """This process received the Hello that went ahead of these destinations.

        Then its "unknown" proves: on one ordered socket the destinations lie between
        that Hello and the Ask it answers, a port has one owner at a time, so nobody
        but this process can have received them.
        """
        for exposure in self.exposures():
            writer = exposure.writers.get(rank)
            if writer is not None and writer.hello == seq:
                writer.incarnation = writer.incarnation or incarnation

    def expose(self, room: int, ranks: Iterable[Rank]) -> Exposure:
        """Destinations are about to be sent to `ranks`. Call before the first send."""
        # TP ranks expose the same requests in the same order: the number is common.
        number = next(self._counter)
        gen, epoch = f"{self._incarnation}-{number}", f"{self.group}-{number}"
        exposure = Exposure(gen, epoch, room, {rank: Writer(rank) for rank in ranks})
        self._exposed[gen] = exposure
        return exposure

    def sent(self, exposure: Exposure, rank: Rank, *, after_hello: bool = True) -> None:
        """The destinations are handed to the socket for `rank` (call before, not after).

        Under the socket's lock, like `hello`: the order of the calls is that of the
        messages. `after_hello`: the last Hello to `rank` left on this very socket.
        """
        writer = exposure.writers[rank]
        writer.sent = True
        writer.incarnation = self.peers.get(rank)
        writer.hello = self._hellos.get(rank, 0) if after_hello else 0

    def complete(self, exposure: Exposure) -> bool:
        """Has every writer's success been admitted for this very generation?

        Stock counts successes by room alone, some time after `admits_success`: one
        of the attempt before may be counted for this one.
        """
        silent = [w for w in exposure.writers.values() if w.sent and not w.reported]
        return len(silent) <= len(exposure.unmarked)

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
        `success_seen`: stock had counted every writer's success before the failure
        (which it may have done for the attempt before, see `complete`).
        """
        landed = success_seen and self.complete(exposure)
        for writer in exposure.writers.values():
            if not writer.sent:
                writer.proof = Proof.NEVER_SENT
            elif writer.reported or landed:
                writer.proof = writer.proof or Proof.LANDED
            writer.next_ask = now
        exposure.gave_up_at = now
        exposure.move(
            "gave up, a writer unproven" if exposure.unproven else "gave up, every writer proven"
        )
        del self._exposed[exposure.gen]
        self._held[exposure.gen] = exposure
        again = exposure.room in self._given_up_rooms
        self._given_up_rooms[exposure.room] = "" if again else exposure.gen
        self._given_up_rooms.move_to_end(exposure.room)
        if len(self._given_up_rooms) > self._memory:
            self._given_up_rooms.popitem(last=False)

    def answer(
        self, rank: Rank, incarnation: str, gen: str, verdict: str, reason: str = ""
    ) -> Exposure | None:
        """A prefill rank answered an Ask. Late, repeated and foreign answers change nothing.

        Returns the exposure it is about, None when it was one of those.
        """
        writer = self._in_question(gen, rank)
        if writer is None:
            return None
        exposure = self._held[gen]
        if verdict == "poisoned":
            writer.stuck = f"a write failed and may still land ({reason})"
            return exposure
        # A successor knows nothing of its predecessor's writes. Where nobody knows who has
        # the destinations, only a process that received them says "drained".
        meant_for = writer.meant_for
        credible = incarnation == meant_for or (meant_for is None and verdict == "drained")
        if credible and verdict in ("drained", "unknown") and not writer.disputed:
            self._prove(exposure, writer, Proof.DRAINED)
        else:
            writer.stuck = "it cannot vouch for the process that may have had the destinations"
        return exposure

    def admits_success(self, room: int, gen: str | None, reporter: Hashable = None) -> bool:
        """May stock be told that a prefill rank reports success of `room`?

        Stock's message names no generation, so a late one would be taken for the
        next attempt's. Prefill ranks with safe reclaim mark theirs; without a mark
        the message counts only where the room cannot be confused. `reporter`: the
        prefill rank as stock numbers it.
        """
        waiting = [e for e in self._exposed.values() if e.room == room]
        if gen is not None:
            return any(e.gen == gen for e in waiting)
        if room in self._given_up_rooms:
            return False
        if waiting and all(r in self.peers for r in waiting[-1].writers):
            return False
        for exposure in waiting[-1:]:
            exposure.unmarked.add(reporter)
        return True

    def marked(self, gen: str, rank: Rank) -> None:
        """`rank` reports success of generation `gen`: P3 for it, if the owner gave up meanwhile."""
        exposure = self._find(gen)
        if exposure is None or (writer := exposure.writers.get(rank)) is None:
            return
        writer.reported = True
        if exposure.state is State.HELD and writer.proof is None:
            self._prove(exposure, writer, Proof.LANDED)

    def success(self, room: int, ranks_reporting: int) -> bool:
        """An unmarked success of a room whose owner gave up: P3 from a rank without safe reclaim.

        Stock prefill of old releases never learns of the abort and reports success
        when its write has landed. True when it proved the exposure.
        """
        return self._unmarked(room, ranks_reporting, Proof.LANDED)

    def acked(self, room: int, ranks_reporting: int) -> bool:
        """Stock's own acknowledgement of an abort: P2 from a rank without safe reclaim.

        Only for an operator who trusts it. True when it proved the exposure.
        """
        return self._unmarked(room, ranks_reporting, Proof.DRAINED)

    def _unmarked(self, room: int, ranks_reporting: int, proof: Proof) -> bool:
        """Stock's word for a room, from `ranks_reporting` distinct ranks since its owner gave up.

        All writers must have given it. A room that was given up before, or is exposed
        again, proves nothing: the word names no generation. Nor does it where a rank
        with safe reclaim is unproven: that one can be asked.
        """
        open_gens = [e for e in self.exposures() if e.room == room]
        if len(open_gens) != 1 or open_gens[0].state is not State.HELD:
            return False
        exposure = open_gens[0]
        unproven = exposure.unproven
        if (
            self._given_up_rooms.get(room) != exposure.gen
            or any(self._speaks(w) for w in unproven)
            or ranks_reporting < len(exposure.writers)
        ):
            return False
        for writer in unproven:
            self._prove(exposure, writer, proof)
        return True

    def fence(self) -> list[Exposure]:
        """Nothing that was ever sent can be reached any more: P4 for every writer that has any.

        The adapter made it so before this call. Returns the exposures whose owners
        still wait: their transfers cannot complete, except where the success is on
        its way already, and that may be taken: it says that all had landed before.
        """
        for exposure in self.exposures():
            for writer in exposure.unproven:
                if writer.sent:
                    writer.proof = Proof.FENCED
            if exposure.state is State.HELD:
                exposure.move("last writer proven")
        return list(self._exposed.values())

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
                    writer.next_ask = now + wait
                    again = writer.asks > 0
                    writer.asks += 1
                    due.append(SendAsk(writer.rank, exposure.room, exposure.gen, again))
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

    def replaced(self, writer: Writer) -> bool:
        """Another process serves the writer's rank now: the one in question is gone."""
        had = writer.meant_for
        return had is not None and self.peers.get(writer.rank, had) != had

    def reason(self, exposure: Exposure) -> str:
        """What this exposure waits for, as one of `REASONS`."""
        unproven = exposure.unproven
        if not unproven:
            return "other TP ranks"
        if any(writer.stuck for writer in unproven):
            return "write of unknown end"
        strangers = any(writer.rank not in self.peers for writer in unproven)
        return "no safe-reclaim" if strangers else "no answer yet"

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

    def _speaks(self, writer: Writer) -> bool:
        """It runs safe reclaim, or did when it had these destinations."""
        known = writer.incarnation or writer.bound_by or writer.reported
        return writer.rank in self.peers or bool(known)

    def _find(self, gen: str) -> Exposure | None:
        return self._exposed.get(gen) or self._held.get(gen)

    def _in_question(self, gen: str, rank: Rank) -> Writer | None:
        """The writer of a held exposure that is still unproven, None when there is none."""
        exposure = self._held.get(gen)
        writer = exposure.writers.get(rank) if exposure is not None else None
        return writer if writer is not None and writer.proof is None else None

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
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class FailRoom:
    """Action: mark the room failed in stock (unless it succeeded), so that its request ends."""

    room: int
    reason: str


@dataclass(frozen=True)
class ForgetRoom:
    """Action: drop the destinations stock still has for this room, before new ones arrive."""

    room: int


Action = SendAnswer | FailRoom | ForgetRoom


_STRANGER = "stranger"
"""The epoch of every attempt by a decode without the plugin."""


class Delivery(enum.Enum):
    """What to do with a message that carries destinations."""

    DELIVER = "hand it to stock"
    DEFER = "keep it until the attempt before it is over"
    DROP = "its attempt is over: stock must not see it"


@dataclass(eq=False, slots=True)
class Attempt:
    """All destinations of one attempt at a room, and what is being done with them."""

    room: int
    epoch: str
    """What the destinations of one attempt have in common, on all its decode ranks."""
    bindings: dict[str, tuple[str, Rank]] = field(default_factory=dict)
    """gen -> (reply_to, rank); of a decode without the plugin, its address twice."""
    exposed: dict[str, Extent] = field(default_factory=dict)
    """gen -> what its destinations stand for."""
    coverage: Coverage = field(default_factory=Coverage)
    short: str = ""
    """Why its success did not leave as one, see `coverage`."""
    asked: set[str] = field(default_factory=set)
    sender: Hashable | None = None
    """Stock's sender of this attempt; its chunks, and no others, are this attempt's."""
    sender_gone: bool = False
    active: int = 0
    """Chunks being processed plus their helper tasks."""
    closed: bool = False
    """No chunk of it is accepted or taken any more."""
    poisoned: str = ""
    """A write failed in a way that may still land. Never cleared."""

    @property
    def sessions(self) -> set[str]:
        """Decode's transfer sessions that its chunks are written to."""
        return {extent.session for extent in self.exposed.values()}

    def exposed_at(self, to: str) -> Extent | None:
        """What the decode rank at `to` exposed to it."""
        for gen, (address, _) in self.bindings.items():
            if address == to:
                return self.exposed.get(gen)
        return None

    @property
    def quiet(self) -> bool:
        return self.active == 0

    @property
    def over(self) -> bool:
        """Nothing of it is being written, will be, or is still looked at by stock."""
        return self.closed and self.quiet and (self.sender is None or self.sender_gone)


class PrefillLedger:
    """The attempts of one prefill rank.

    Stock keys everything by room; a room may be used again (a client's choice, and
    stock's own after a retraction). So each attempt has its own sender, a room
    serves one attempt at a time, and the next one's destinations wait until the one
    before is over.

    `memory` bounds how many finished, quiet, unpoisoned attempts and how many
    never-seen aborted generations are remembered. Forgetting a finished one is
    safe: it is answered "unknown", which the same process may truthfully say.
    """

    def __init__(self, incarnation: str, *, memory: int = 65536) -> None:
        self.incarnation = incarnation
        self._memory = memory
        self._rooms: dict[int, Attempt] = {}
        """The attempt each room serves now."""
        self._by_epoch: dict[tuple[int, str], Attempt] = {}
        self._by_gen: dict[str, Attempt] = {}
        self._senders: dict[Hashable, Attempt] = {}
        self._waiting: dict[int, deque[Hashable]] = {}
        """Senders that came before the destinations of their attempt, by room."""
        self._finished: deque[Attempt] = deque()
        self._unsent: OrderedDict[int, Attempt] = OrderedDict()
        """Attempts aborted before their request reached prefill."""
        self._aborted_unseen: OrderedDict[str, None] = OrderedDict()
        self._deferred: dict[str, bool] = {}
        """Generations whose destinations wait, and whether their owner gave up meanwhile."""

    # -- messages from decode ---------------------------------------------------

    def bind(
        self, room: int, epoch: str, gen: str, reply_to: str, rank: Rank, *, extent: Extent
    ) -> tuple[Delivery, list[Action]]:
        """Destinations of `gen` arrived. The verdict comes before stock sees them."""
        if self._deferred.pop(gen, False):
            self._remember_aborted(gen)
        if gen in self._aborted_unseen or gen in self._by_gen:
            return Delivery.DROP, []
        delivery, actions = Delivery.DELIVER, list[Action]()
        attempt = self._by_epoch.get((room, epoch))
        if attempt is None:
            delivery, actions, attempt = self._next_attempt(room, epoch)
        if attempt is None:
            self._deferred[gen] = False
            return delivery, actions
        attempt.bindings[gen] = (reply_to, rank)
        attempt.exposed[gen] = extent
        self._by_gen[gen] = attempt
        return (Delivery.DROP if attempt.closed else delivery), actions

    def bind_stranger(
        self, room: int, source: str, extent: Extent
    ) -> tuple[Delivery, list[Action]]:
        """Destinations from a decode rank without the plugin. It is never asked for."""
        attempt = self._rooms.get(room)
        if (
            attempt is not None
            and attempt.epoch == _STRANGER
            and not attempt.closed
            and source not in attempt.bindings
        ):
            attempt.bindings[source] = (source, "")
            attempt.exposed[source] = extent
            return Delivery.DELIVER, []
        delivery, actions, attempt = self._next_attempt(room, _STRANGER)
        if attempt is not None:
            attempt.bindings[source] = (source, "")
            attempt.exposed[source] = extent
        return delivery, actions

    def ask(self, room: int, gen: str, reply_to: str, rank: Rank) -> list[Action]:
        """The owner of `gen` gave up. Repeats are answered again: the answer may be lost."""
        attempt = self._by_gen.get(gen)
        if gen in self._deferred:
            self._deferred[gen] = True
        elif attempt is None:
            self._remember_aborted(gen)
        if attempt is None:
            return [SendAnswer(reply_to, rank, gen, "unknown")]
        attempt.bindings[gen] = (reply_to, rank)
        attempt.asked.add(gen)
        return [*self._close(attempt, "aborted by the decode side"), *self._answers(attempt)]

    # -- stock's senders and their chunks -----------------------------------------

    def sender_made(self, sender: Hashable, room: int) -> list[Action]:
        """Stock began to serve a request: it belongs to the room's attempt that has none."""
        attempt = self._rooms.get(room)
        if attempt is None or attempt.sender is not None:
            self._waiting.setdefault(room, deque()).append(sender)
            return []
        self._adopt(attempt, sender)
        if attempt.closed:
            return [FailRoom(room, "aborted by the decode side before it began")]
        return []

    def offer(
        self, sender: Hashable, pages: int, states: tuple[int, ...] | None, tokens: int | None
    ) -> None:
        """Stock's `sender` is about to split off and queue a chunk (see `Coverage.offer`)."""
        if (attempt := self._senders.get(sender)) is not None:
            attempt.coverage.offer(pages, states, tokens)

    def put(self, sender: Hashable) -> Attempt | None:
        """A chunk of `sender` is about to be queued. None: drop it, its attempt is over."""
        attempt = self._senders.get(sender)
        return None if attempt is None or attempt.closed else attempt

    def take(self, attempt: Attempt, pages: int = 0, last: bool = False) -> bool:
        """A worker is about to process a chunk of `pages`. False: drop it."""
        if attempt.closed:
            return False
        attempt.active += 1
        attempt.coverage.begin(pages, last, attempt.sessions)
        return True

    def covers(self, attempt: Attempt, to: str, sends_kv: Callable[[str], bool]) -> bool:
        """May the success of `attempt` leave for the decode rank at `to`?

        Only if all that was exposed there was written; `attempt.short` says what was not.
        `sends_kv(session)`: whether this rank is to send KV there at all.
        """
        extent = attempt.exposed_at(to)
        if extent is None:
            return True
        attempt.coverage.settle(attempt.sessions)
        missing = attempt.coverage.missing(extent, sends_kv)
        attempt.short = missing or attempt.short
        return not missing

    def opened(self, attempt: Attempt) -> None:
        """A helper task of the chunk in hand was submitted (it may outlive the chunk)."""
        attempt.active += 1

    def done(self, attempt: Attempt) -> list[Action]:
        """A chunk or a helper task ended."""
        if attempt.active <= 0:
            raise LedgerError(f"room {attempt.room}: more ends than beginnings")
        attempt.active -= 1
        if attempt.sender_gone and attempt.over:
            self._finish(attempt)
        return self._answers(attempt)

    def failed(self, attempt: Attempt, reason: str) -> list[Action]:
        """A write reported failure: it may still be running. Nothing more is written."""
        attempt.poisoned = attempt.poisoned or reason
        return self._close(attempt, f"a write failed: {reason}")

    def retire(self, sender: Hashable, room: int) -> list[Action]:
        """Stock is done with `sender` (it was cleared): no chunk of it will come."""
        attempt = self._senders.pop(sender, None)
        if attempt is None:
            waiting = self._waiting.get(room)
            if waiting and sender in waiting:
                waiting.remove(sender)
                if not waiting:
                    del self._waiting[room]
            return []
        attempt.closed = attempt.sender_gone = True
        if attempt.over:
            self._finish(attempt)
        return self._answers(attempt)

    # -- queries ----------------------------------------------------------------

    def busy(self, sender: Hashable) -> bool:
        """True while a chunk of `sender` may be reading its source pages."""
        attempt = self._senders.get(sender)
        return attempt is not None and not attempt.quiet

    def bound_for(self, attempt: Attempt, reply_to: str) -> tuple[str, Rank] | None:
        """Generation and rank of the owner at `reply_to`, None without the plugin."""
        if attempt.epoch == _STRANGER:
            return None
        for gen, (to, rank) in attempt.bindings.items():
            if to == reply_to:
                return gen, rank
        return None

    # -- internals ---------------------------------------------------------------

    def _remember_aborted(self, gen: str) -> None:
        self._aborted_unseen[gen] = None
        if len(self._aborted_unseen) > self._memory:
            self._aborted_unseen.popitem(last=False)

    def _next_attempt(self, room: int, epoch: str) -> tuple[Delivery, list[Action], Attempt | None]:
        before = self._rooms.get(room)
        if before is not None and not before.over:
            # A chunk of the attempt before would be written to the new destinations,
            # and its end would end the new one.
            return Delivery.DEFER, self._close(before, "its room is used again"), None
        if before is not None:
            self._finish(before)
        return Delivery.DELIVER, [ForgetRoom(room)], self._open(room, epoch)

    def _open(self, room: int, epoch: str) -> Attempt:
        attempt = self._rooms[room] = self._by_epoch[room, epoch] = Attempt(room, epoch)
        if waiting := self._waiting.get(room):
            self._adopt(attempt, waiting.popleft())
            if not waiting:
                del self._waiting[room]
        return attempt

    def _adopt(self, attempt: Attempt, sender: Hashable) -> None:
        attempt.sender = sender
        self._senders[sender] = attempt
        self._unsent.pop(id(attempt), None)

    def _close(self, attempt: Attempt, reason: str) -> list[Action]:
        if attempt.closed:
            return []
        attempt.closed = True
        if attempt.sender is None:
            self._unsent[id(attempt)] = attempt
            if len(self._unsent) > self._memory:
                self._finish(self._unsent.popitem(last=False)[1])
        return [FailRoom(attempt.room, reason)]

    def _answers(self, attempt: Attempt) -> list[Action]:
        if not (attempt.closed and attempt.quiet):
            return []
        verdict: Verdict = "poisoned" if attempt.poisoned else "drained"
        answers: list[Action] = []
        for gen in sorted(attempt.asked):
            reply_to, rank = attempt.bindings[gen]
            answers.append(SendAnswer(reply_to, rank, gen, verdict, attempt.poisoned))
        attempt.asked.clear()
        return answers

    def _finish(self, attempt: Attempt) -> None:
        """Take the attempt off its room; remember it for late questions and stragglers."""
        self._unsent.pop(id(attempt), None)
        attempt.coverage.writes.clear()  # one for each layer and decode rank, say
        attempt.exposed.clear()
        if self._rooms.get(attempt.room) is not attempt:
            return
        del self._rooms[attempt.room]
        if attempt.poisoned:
            return  # kept for good: forgetting it would turn "poisoned" into "unknown"
        self._finished.append(attempt)
        if len(self._finished) > self._memory:
            forgotten = self._finished.popleft()
            key = forgotten.room, forgotten.epoch
            if self._by_epoch.get(key) is forgotten:
                del self._by_epoch[key]
            for gen in forgotten.bindings:
                self._by_gen.pop(gen, None)
