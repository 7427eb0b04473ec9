"""When is nothing of an attempt written any more? Every rule of the prefill side.

On prefill the unit is an *attempt*: all destinations of one room that belong together, and the
one stock sender whose chunks go there. Its life is `attempt.ATTEMPT_TRANSITIONS`. Closing an
attempt and taking a chunk are both single calls, so a chunk is either taken before the close
(and waited for) or never taken. A room serves one attempt at a time; destinations of the next
wait until the one before is `over`.

Which attempts are remembered, and for how long: `attempts`.
See `decode_ledger` for the invariant that this serves, and for the messages.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Hashable

from sglang_scaling_fixes.reclaim.rules.attempt import WITHOUT_PLUGIN, Attempt
from sglang_scaling_fixes.reclaim.rules.attempts import Attempts
from sglang_scaling_fixes.reclaim.rules.coverage import Extent
from sglang_scaling_fixes.reclaim.rules.prefill_actions import (
    Action,
    FailRoom,
    ForgetRoom,
    SendAck,
    SendEnded,
)
from sglang_scaling_fixes.reclaim.rules.refused_rooms import REFUSED
from sglang_scaling_fixes.reclaim.rules.types import Rank


class Delivery(enum.Enum):
    """What to do with a message that carries destinations."""

    DELIVER = "hand it to stock"
    DEFER = "keep it until the attempt before it is over"
    DROP = "its attempt is over: stock must not see it"
    REFUSE = "too many are kept already: as DROP, and it has no attempt"


NO_ROOM = "its room is in use, and too many requests wait for theirs"
"""Why a request ends whose destinations are not even kept back."""


class PrefillLedger(Attempts):
    """The attempts of one prefill rank.

    Stock keys everything by room; a room may be used again (a client's choice, and
    stock's own after a retraction). So each attempt has its own sender, a room
    serves one attempt at a time, and the next one's destinations wait until the one
    before is over.
    """

    # -- messages from decode ---------------------------------------------------

    def bind(
        self,
        room: int,
        attempt_id: str,
        lease: str,
        reply_to: str,
        rank: Rank,
        *,
        extent: Extent,
        came: float | None = None,
    ) -> tuple[Delivery, list[Action]]:
        """Destinations of `lease` arrived. The verdict comes before stock sees them.

        `came`: when its request came to decode (see `EndedRooms.take`); None: this decode is
        told of no ending.
        """
        self.refused_rooms.forget(room)  # decode tried again, and takes it this time
        waited = self.kept.drop(lease)
        if lease in self._by_lease or (not waited and self._forgotten.refuses(lease)):
            return Delivery.DROP, []
        delivery, actions = Delivery.DELIVER, list[Action]()
        attempt = self._by_attempt_id.get((room, attempt_id))
        if attempt is None:
            delivery, actions, attempt = self._next_attempt(room, attempt_id, lease, waited, came)
        if attempt is None:
            if delivery is Delivery.REFUSE:
                self._forgotten.refuse(lease)
                if came is not None:  # received by nobody, now or later
                    actions.append(SendEnded(reply_to, rank, lease, "drained", NO_ROOM))
            return delivery, actions
        attempt.bind(lease, reply_to, rank, extent, listens=came is not None)
        self._by_lease[lease] = attempt
        if waited:
            self.kept.came_free(room)  # for others of this attempt, or one that ends it
        return (Delivery.DROP if attempt.closed else delivery), [*actions, *attempt.says()]

    def bind_without_plugin(
        self, room: int, source: str, extent: Extent
    ) -> tuple[Delivery, list[Action]]:
        """Destinations from a decode rank without the plugin. It is never asked for."""
        delivery, actions = Delivery.DELIVER, list[Action]()
        waited = self.kept.drop((room, source))
        attempt = self._rooms.get(room)
        if (
            attempt is None
            or attempt.attempt_id != WITHOUT_PLUGIN
            or attempt.closed
            or source in attempt.bindings
        ):
            delivery, actions, attempt = self._next_attempt(
                room, WITHOUT_PLUGIN, (room, source), waited
            )
        if attempt is not None:
            attempt.bind(source, source, "", extent)
            if waited:
                self.kept.came_free(room)
        return delivery, actions

    def abort(self, room: int, lease: str, reply_to: str, rank: Rank) -> list[Action]:
        """The owner of `lease` gave up. Repeats are answered again: the answer may be lost."""
        attempt = self._by_lease.get(lease)
        if attempt is None:
            if reason := self._forgotten.poisoned(lease):
                return [SendAck(reply_to, rank, lease, "poisoned", reason)]
            self.kept.drop(lease)
            self._forgotten.refuse(lease)
            return [SendAck(reply_to, rank, lease, "unknown")]
        attempt.bindings[lease] = (reply_to, rank)
        attempt.awaiting_ack.add(lease)
        attempt.untold = ()  # what all its decode ranks agree on, each of them says itself
        closed = self._close(attempt, "aborted by the decode side", by_decode=True)
        if attempt.quiet:
            return [*closed, *attempt.says()]
        return [*closed, SendAck(reply_to, rank, lease, "writing")]

    def refused(self, room: int, now: float) -> list[Action]:
        """Decode does not take the request of `room`: it will send no destinations for it."""
        before = self._rooms.get(room)
        if before is not None and not before.over:
            return []  # destinations are here: of another decode, or of a request before
        self.ended_rooms.forget(room)
        if room in self._waiting:
            return [FailRoom(room, REFUSED)]
        self.refused_rooms.remember(room, now)
        return []

    # -- stock's senders and their chunks -----------------------------------------

    def sender_made(self, sender: Hashable, room: int, now: float = 0.0) -> list[Action]:
        """Stock began to serve a request: it belongs to the room's attempt that has none."""
        self.ended_rooms.forget(room)
        attempt = self._rooms.get(room)
        refused = self.refused_rooms.take(room, now)
        if attempt is None or attempt.sender is not None:
            self._waiting.setdefault(room, deque()).append(sender)
            return [FailRoom(room, REFUSED)] if refused else []
        self._adopt(attempt, sender)
        if attempt.closed:
            return [FailRoom(room, f"{attempt.closed_for}, before it began")]
        return []

    def offer(
        self, sender: Hashable, pages: int, states: tuple[int, ...] | None, tokens: int | None
    ) -> None:
        """Stock's `sender` is about to split off and queue a chunk (see `Coverage.offer`)."""
        if (attempt := self._senders.get(sender)) is not None:
            attempt.coverage.offer(pages, states, tokens)

    def skipped(self, sender: Hashable) -> None:
        """Stock did not queue the chunk that it was handed."""
        if (attempt := self._senders.get(sender)) is not None:
            attempt.coverage.unqueued = True

    def put(self, sender: Hashable) -> Attempt | None:
        """A chunk of `sender` is about to be queued. None: drop it, its attempt is over."""
        attempt = self._senders.get(sender)
        return None if attempt is None or attempt.closed else attempt

    def take(self, attempt: Attempt, pages: int = 0, last: bool = False) -> bool:
        """A worker is about to process a chunk of `pages`. False: drop it."""
        if attempt.closed:
            return False
        attempt.begin()
        attempt.coverage.begin(pages, last, attempt.exposed.values())
        return True

    def success_leaves(self, attempt: Attempt, to: str, sends_kv: Callable[[str], bool]) -> bool:
        """May the success of `attempt` leave for the decode rank at `to`, or is it a failure?

        Only if no write of it failed (stock ignores some that do), and if all that was exposed
        there was written: `attempt.short` says what was not. `sends_kv(session)`: whether this
        rank is to send KV there at all.
        """
        extent = attempt.exposed_at(to)
        if extent is None:  # of a decode with the plugin it is known
            return attempt.attempt_id == WITHOUT_PLUGIN and not attempt.poisoned
        attempt.coverage.settle(attempt.exposed.values())
        missing = attempt.coverage.missing(extent, sends_kv)
        attempt.short = missing or attempt.short
        if missing or attempt.poisoned:
            return False
        attempt.reports(to)
        return True

    def opened(self, attempt: Attempt) -> None:
        """A helper task of the chunk in hand was submitted (it may outlive the chunk)."""
        attempt.begin()

    def done(self, attempt: Attempt) -> list[Action]:
        """A chunk or a helper task ended."""
        attempt.end()
        if attempt.over:
            self._finish(attempt)
        return attempt.says()

    def failed(self, attempt: Attempt, reason: str) -> list[Action]:
        """A write reported failure: it may still be running. Nothing more is written."""
        attempt.poisoned = attempt.poisoned or reason
        return self._close(attempt, f"a write failed: {reason}")

    def retire(self, sender: Hashable, room: int) -> list[Action]:
        """Stock is done with `sender` (it was cleared): no chunk of it will come."""
        attempt = self._senders.pop(sender, None)
        if attempt is None:
            self._unwait(sender, room)
            return []
        attempt.lose_sender()
        if attempt.over:
            self._finish(attempt)
        return attempt.says()

    # -- requests that end here without success ---------------------------------------

    def stopped(self, sender: Hashable, room: int, now: float, why: str) -> list[Action]:
        """Stock ended the request of `sender`, whose chunks are no use. It may clear it later."""
        attempt = self._senders.get(sender)
        if attempt is None:
            if self._unwait(sender, room) and room not in self._waiting and why != REFUSED:
                self.ended_rooms.remember(room, now, why)
            return []
        self._shut(attempt, why)
        return attempt.says()

    def rejected(self, room: int, now: float, why: str) -> list[Action]:
        """Stock rejected the room's request: it will have no sender."""
        attempt = self._rooms.get(room)
        if attempt is None or attempt.sender is not None:
            if room not in self._waiting:
                self.ended_rooms.remember(room, now, why)
            return []
        self._shut(attempt, why)
        said = attempt.says()
        self._finish(attempt)
        return said

    # -- queries ----------------------------------------------------------------

    def busy(self, sender: Hashable) -> bool:
        """True while a chunk of `sender` may be reading its source pages."""
        attempt = self._senders.get(sender)
        return attempt is not None and not attempt.quiet

    # -- internals ---------------------------------------------------------------

    def _next_attempt(
        self, room: int, attempt_id: str, key: Hashable, waited: bool, came: float | None = None
    ) -> tuple[Delivery, list[Action], Attempt | None]:
        """An attempt for destinations that have none. `waited`: they were kept back before."""
        before = self._rooms.get(room)
        if before is not None and not before.over:
            # A chunk of the attempt before would be written to the new destinations,
            # and its end would end the new one.
            actions = [*self._close(before, "its room is used again"), *before.says()]
            kept = self.kept.keep(room, key, again=waited)
            if before.over:
                self.kept.came_free(room)
            return Delivery.DEFER if kept else Delivery.REFUSE, actions, None
        if before is not None:
            self._finish(before)
        attempt, closed = self._open(room, attempt_id, came)
        return Delivery.DELIVER, [ForgetRoom(room), *closed], attempt
