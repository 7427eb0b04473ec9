"""When may a KV slot be used again? Every rule of safe reclaim, and nothing else.

Two rules for `reclaim.rules`: everything that decides whether a slot may be reused
lives there; and nothing there knows SGLang, sockets, threads or clocks.

The invariant
-------------
A KV slot or metadata slot whose address was ever sent to a prefill rank does not
re-enter a free list until, for every such rank (a *writer*), one of these holds:

    P1  the destination was never sent to it
    P2  it acknowledged this room *and this lease* as drained: nothing of it
        is posted, nothing will be
    P3  it reported success of all its writes, and success means landed
        (and the writes were all that was exposed: see `coverage`)
    P4  a fence: it can no longer reach the memory

Theory of operation
-------------------
Each time decode sends destinations it opens an *exposure* with a lease that
is never used again, so a reused room cannot be confused with its predecessor.
Most exposures end in `landed`: KV arrived, the slots are ordinary from then on.
When the owner gives up first (abort, timeout, failure: whatever stock calls it),
the slots are withheld and every unproven writer is asked, again and again with
backoff, until it answers. Only then do the slots go back.

    decode                                   prefill
    ------                                   -------
    EXPOSED --- Bind(lease), destinations --->  bound
       |                                        | chunks: put, take, done
       |  owner gives up
       v
     HELD  ---------- Abort(lease) ------------->  closed: queued chunks are dropped,
       |   (repeated until answered)            | no new chunk is taken
       |                                        | the chunk in hand finishes
       |   <-------- AbortAck(drained) ---------  quiet
       v
    PROVEN -- every TP rank agrees --> RETURNED

What prefill does with destinations, and when it is quiet: `prefill_ledger`.

Assumed of the transport: messages from one decode rank to one prefill rank arrive
in order or not at all (one ZMQ PUSH socket each), and never twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

from sglang_scaling_fixes.reclaim.rules.causes import Cause, Causes, Wait
from sglang_scaling_fixes.reclaim.rules.decode_audit import DecodeAudit
from sglang_scaling_fixes.reclaim.rules.endings import Endings
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState, Writer
from sglang_scaling_fixes.reclaim.rules.questions import May, Questions, SendAbort, always
from sglang_scaling_fixes.reclaim.rules.successes import Successes
from sglang_scaling_fixes.reclaim.rules.types import Proof, Rank, Verdict


class DecodeLedger(DecodeAudit):
    """The exposures of one decode rank. `first_wait`, `max_wait`: see `Questions`."""

    def __init__(
        self,
        incarnation: str,
        *,
        first_wait: float = 0.1,
        max_wait: float = 2.0,
        memory: int = 65536,
    ) -> None:
        self._incarnation = incarnation
        self.group = incarnation
        """An identity all TP ranks share, once they have agreed on one."""
        self._number = 0
        """Of the last exposure."""
        self.engine = 0
        """Number of the receiving engine that destinations name from now on."""
        self.peers: dict[Rank, str] = {}
        """Ranks known to run safe reclaim, with the process that said so."""
        self.answered_by: dict[Rank, str] = {}
        """Rank -> the process that answered last. It may be an old answer: good for blame alone."""
        self._hellos: dict[Rank, int] = {}
        """Rank -> the number of the last Hello sent to it."""
        self._exposed: dict[str, Exposure] = {}
        self._held: dict[str, Exposure] = {}
        """In the order of giving up."""
        self._rooms: dict[int, dict[str, Exposure]] = {}
        """Room -> its exposures whose slots are not ordinary, by lease."""
        self._questions = Questions(first_wait, max_wait)
        self._causes = Causes()
        self._given_up_rooms: OrderedDict[int, str] = OrderedDict()
        """Room -> the lease given up, empty when more than one was: the last
        `memory` rooms. A room in here may still get a success of the old attempt."""
        self._memory = memory
        self.successes = Successes(self)
        """What reports of success are worth."""
        self.endings = Endings(self)
        """What it is worth that prefill ended a request."""

    # -- events ---------------------------------------------------------------

    def hello(self, rank: Rank) -> int:
        """Decode registers with `rank` anew: the number its Hello carries.

        Call under the lock of the socket, right before the Hello goes out. Who
        serves the rank is not known until it says so.
        """
        self.peers.pop(rank, None)
        self._hellos[rank] = self._hellos.get(rank, 0) + 1
        return self._hellos[rank]

    def hello_acked(
        self, rank: Rank, incarnation: str, lease: str | None = None, seq: int | None = None
    ) -> None:
        """A prefill process said it serves `rank`.

        With `lease` it bound that lease; with `seq` it received that Hello.
        """
        exposure = self.find(lease) if lease is not None else None
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
        if exposure is not None:
            exposure.waits = None

    def _served_before(self, rank: Rank, incarnation: str, seq: int) -> None:
        """This process received the Hello that went ahead of these destinations.

        Then its "unknown" proves: on one ordered socket the destinations lie between
        that Hello and the Abort it answers, a port has one owner at a time, so nobody
        but this process can have received them.
        """
        for exposure in self.exposures():
            writer = exposure.writers.get(rank)
            if writer is not None and writer.hello == seq:
                writer.incarnation = writer.incarnation or incarnation
                exposure.waits = None

    def expose(self, room: int, ranks: Iterable[Rank], prefill: str = "") -> Exposure:
        """Destinations are about to be sent to `ranks`. Call before the first send."""
        # TP ranks expose the same requests in the same order: the number is common.
        self._number = number = self._number + 1
        lease, attempt_id = f"{self._incarnation}-{number}", f"{self.group}-{number}"
        writers = {rank: Writer(rank) for rank in ranks}
        exposure = Exposure(lease, attempt_id, room, writers, self.engine, prefill)
        self._exposed[lease] = exposure
        self._rooms.setdefault(room, {})[lease] = exposure
        return exposure

    def sent(self, exposure: Exposure, rank: Rank, *, after_hello: bool = True) -> None:
        """The destinations are handed to the socket for `rank` (call before, not after).

        Under the socket's lock, like `hello`: the order of the calls is that of the
        messages. `after_hello`: the last Hello to `rank` left on this very socket.
        """
        writer = exposure.writers[rank]
        writer.sent, writer.proof = True, None
        exposure.engine = self.engine  # sent again, they name the present one
        writer.incarnation = self.peers.get(rank)
        writer.hello = self._hellos.get(rank, 0) if after_hello else 0

    def complete(self, exposure: Exposure) -> bool:
        """Has every writer's success been admitted for this very lease?

        Stock counts successes by room alone, some time after `admits_success`: one
        of the attempt before may be counted for this one.
        """
        silent = [w for w in exposure.writers.values() if w.sent and not w.reported]
        return len(silent) <= len(exposure.untagged)

    def landed(self, exposure: Exposure) -> None:
        """Every writer reported success and the owner takes the KV: P3 for all."""
        exposure.move("landed")
        for writer in exposure.writers.values():
            writer.proof = writer.proof or Proof.LANDED
        del self._exposed[exposure.lease]
        self._leave_room(exposure)

    def end(
        self,
        exposure: Exposure,
        now: float,
        *,
        committed: bool,
        success_seen: bool = False,
    ) -> bool:
        """The owner has no more use for its receiver. True if it takes the KV, which is there.

        Not the rank's own success decides: one rank may have that alone when stock ends the
        request on all of them (aborted, failed elsewhere, no room to restore a prefix).
        `committed`: stock hands the KV to the request, which it does on every TP rank or none.
        """
        if committed:
            self.landed(exposure)
        else:
            self.give_up(exposure, now, success_seen=success_seen)
        return committed

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
            elif writer.ended is not None and writer.weigh(*writer.ended):
                writer.proof = writer.proof or Proof.DRAINED
        exposure.gave_up_at = now
        proven = all(writer.proof is not None for writer in exposure.writers.values())
        exposure.move("gave up, every writer proven" if proven else "gave up, a writer unproven")
        del self._exposed[exposure.lease]
        self._held[exposure.lease] = exposure
        self._questions.add(exposure, now)
        again = exposure.room in self._given_up_rooms
        self._given_up_rooms[exposure.room] = "" if again else exposure.lease
        self._given_up_rooms.move_to_end(exposure.room)
        if len(self._given_up_rooms) > self._memory:
            self._given_up_rooms.popitem(last=False)

    def counted(self, exposure: Exposure, reporters: Iterable[Hashable]) -> None:
        """Stock had counted the success of these prefill ranks when the owner gave up."""
        exposure.late.update(reporters)

    def ack(
        self,
        rank: Rank,
        incarnation: str,
        lease: str,
        verdict: Verdict,
        reason: str = "",
        *,
        now: float = 0.0,
    ) -> Exposure | None:
        """A prefill rank answered an Abort. Late, repeated and foreign answers change nothing.

        Returns the exposure it is about, None when it was one of those.
        """
        self.answered_by[rank] = incarnation
        writer = self._in_question(lease, rank)
        if writer is None:
            return None
        exposure = self._held[lease]
        if writer.weigh(incarnation, verdict, reason):
            exposure.prove(writer, Proof.DRAINED)
        elif verdict == "writing":
            writer.writes_at = now
        exposure.waits = None
        return exposure

    def engine_made(self) -> None:
        """Another engine receives what is sent from now on; the ones before still receive."""
        self.engine += 1

    def engines_closed(self) -> list[Exposure]:
        """A fence: every engine but the present one is closed. P4 for all writers that name one.

        The adapter made it so before this call. Returns the exposures whose owners
        still wait: their transfers cannot complete, except where the success is on
        its way already, and that may be taken: it says that all had landed before.
        """
        for exposure in self.exposures():
            if exposure.engine == self.engine:
                continue
            for writer in exposure.unproven:
                if writer.sent:
                    writer.proof = Proof.FENCED
            exposure.waits = None
            if exposure.state is ExposureState.HELD:
                exposure.move("last writer proven")
        return self.receiving_elsewhere()

    def receiving_elsewhere(self) -> list[Exposure]:
        """Exposures whose owners wait for what an engine before the present one receives."""
        return [e for e in self._exposed.values() if e.engine != self.engine]

    def returned(self, exposure: Exposure) -> None:
        """Every TP rank agreed; the adapter puts the slots back right after this call."""
        exposure.move("every TP rank agrees")
        del self._held[exposure.lease]
        self._questions.drop(exposure)
        self._leave_room(exposure)

    def tick(
        self, now: float, ranks: Iterable[Rank] | None = None, may: May = always
    ) -> list[SendAbort]:
        """Questions that are due, to `ranks` or to all. Only who speaks safe reclaim is asked,
        and `may` be asked now."""

        def asked(rank: Rank, now: float) -> bool:
            return rank in self.peers and may(rank, now)

        return self._questions.due(now, ranks, asked)

    def unsent(self, ask: SendAbort) -> None:
        """A question that was due could not leave."""
        if (exposure := self._held.get(ask.lease)) is not None:
            self._questions.unsent(ask, exposure)

    # -- queries --------------------------------------------------------------

    def given_up(self, room: int) -> str | None:
        """The lease given up of `room`, empty when more than one was, None when none."""
        return self._given_up_rooms.get(room)

    def hellos(self, rank: Rank) -> int:
        """How many Hellos were sent to `rank`."""
        return self._hellos.get(rank, 0)

    @property
    def causes(self) -> list[Cause]:
        """What is held, by what it waits for, in the order of the oldest of each."""
        return self._causes.of(self._held.values())

    def replaced(self, writer: Writer | Wait) -> bool:
        """Another process serves the writer's rank now: the one in question is gone."""
        had = writer.meant_for
        return had is not None and self.peers.get(writer.rank, had) != had

    def answered_for(self, writer: Writer | Wait) -> bool:
        """The last answer of the writer's rank came from another process."""
        had = writer.meant_for
        return had is not None and self.answered_by.get(writer.rank, had) != had

    # -- internals ------------------------------------------------------------

    def _leave_room(self, exposure: Exposure) -> None:
        others = self._rooms[exposure.room]
        del others[exposure.lease]
        if not others:
            del self._rooms[exposure.room]

    def _in_question(self, lease: str, rank: Rank) -> Writer | None:
        """The writer of a held exposure that is still unproven, None when there is none."""
        exposure = self._held.get(lease)
        writer = exposure.writers.get(rank) if exposure is not None else None
        return writer if writer is not None and writer.proof is None else None
