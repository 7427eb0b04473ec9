"""Which attempts prefill remembers, and for how long.

All it holds is bounded, whoever dies or never comes:

    attempts with a sender      by stock's senders; it is told when one goes
    senders that wait           the same
    attempts without a sender   `unserved`; the oldest is closed, so that its request fails
                                if it comes after all
    closed ones of these        `memory`, then they are finished
    finished attempts           `memory`, then `forgotten.Forgotten` answers for them
    destinations kept back      `kept_back`, then those that come are refused

Which events open, close and end them: `prefill_ledger`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable

from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.ended_rooms import EndedRooms
from sglang_scaling_fixes.reclaim.rules.forgotten import Forgotten
from sglang_scaling_fixes.reclaim.rules.kept_back import KeptBack
from sglang_scaling_fixes.reclaim.rules.prefill_actions import Action, FailRoom, ForgetRoom
from sglang_scaling_fixes.reclaim.rules.prefill_audit import PrefillAudit
from sglang_scaling_fixes.reclaim.rules.refused_rooms import RefusedRooms

MEMORY = 4096
"""Finished attempts, leases and so on that are remembered, of each kind. Late questions come
within seconds; a rank that ends 400 requests a second remembers 10 s."""
UNSERVED = 16384
"""Attempts without a request. A decode exposes no more requests than its pool has places for, and
the two halves of a request arrive at about the same time: several decodes do not come near it."""
KEPT_BACK = 1024
"""Destinations kept back. Each waits for a room that is in use: clients use rooms once, and stock
uses one again only after a retraction."""


class Attempts(PrefillAudit):
    """The tables of one prefill rank: from opening an attempt to forgetting it."""

    def __init__(
        self,
        incarnation: str,
        *,
        memory: int = MEMORY,
        unserved: int = UNSERVED,
        kept_back: int = KEPT_BACK,
    ) -> None:
        self.incarnation = incarnation
        self._memory = memory
        self._unserved_limit = unserved
        self._rooms: dict[int, Attempt] = {}
        """The attempt each room serves now."""
        self._by_attempt_id: dict[tuple[int, str], Attempt] = {}
        self._by_lease: dict[str, Attempt] = {}
        self._senders: dict[Hashable, Attempt] = {}
        self._waiting: dict[int, deque[Hashable]] = {}
        """Senders that came before the destinations of their attempt, by room."""
        self._finished: deque[Attempt] = deque()
        self._unsent: OrderedDict[Attempt, None] = OrderedDict()
        """Attempts aborted before their request reached prefill."""
        self._unserved: OrderedDict[Attempt, None] = OrderedDict()
        """Open attempts without a sender."""
        self._forgotten = Forgotten(memory)
        self.kept = KeptBack(kept_back)
        """Destinations that wait; their key is the lease, or `(room, source)` without one."""
        self.refused_rooms = RefusedRooms()
        self.ended_rooms = EndedRooms(memory)

    def _unwait(self, sender: Hashable, room: int) -> bool:
        """True if `sender` waited for its destinations. It does no more."""
        waiting = self._waiting.get(room, ())
        if not waiting or sender not in waiting:
            return False
        waiting.remove(sender)
        if not waiting:
            del self._waiting[room]
        return True

    def _open(self, room: int, attempt_id: str, came: float | None) -> tuple[Attempt, list[Action]]:
        attempt = self._rooms[room] = self._by_attempt_id[room, attempt_id] = Attempt(
            room, attempt_id
        )
        if waiting := self._waiting.get(room):
            self._adopt(attempt, sender := waiting[0])
            self._unwait(sender, room)
            return attempt, []
        if why := self.ended_rooms.take(room, came):
            self._shut(attempt, why)
            self._finish(attempt)
            return attempt, []
        self._unserved[attempt] = None
        if len(self._unserved) <= self._unserved_limit:
            return attempt, []
        oldest = next(iter(self._unserved))
        reason = f"no request came for it while {self._unserved_limit} others waited for theirs"
        closed = self._close(oldest, reason)
        return attempt, [*closed, ForgetRoom(oldest.room), *oldest.says()]

    def _adopt(self, attempt: Attempt, sender: Hashable) -> None:
        attempt.adopt(sender)
        self._senders[sender] = attempt
        self._unsent.pop(attempt, None)
        self._unserved.pop(attempt, None)

    def _close(self, attempt: Attempt, reason: str, *, by_decode: bool = False) -> list[Action]:
        if attempt.closed:
            return []
        self._shut(attempt, reason, by_decode=by_decode)
        if attempt.sender is None:
            self._unsent[attempt] = None
            if len(self._unsent) > self._memory:
                self._finish(self._unsent.popitem(last=False)[0])
        return [FailRoom(attempt.room, reason)]

    def _shut(self, attempt: Attempt, reason: str, *, by_decode: bool = False) -> None:
        """Close it, if it is open. Without a request it is over, and its room is free."""
        if attempt.closed:
            return
        attempt.close("" if by_decode else reason)
        attempt.closed_for = reason
        if attempt.sender is None:
            self._unserved.pop(attempt, None)
            self.kept.came_free(attempt.room)

    def _finish(self, attempt: Attempt) -> None:
        """Take the attempt off its room; remember it for late questions and stragglers."""
        self._unsent.pop(attempt, None)
        attempt.coverage.writes.clear()  # one for each layer and decode rank, say
        attempt.exposed.clear()
        if self._rooms.get(attempt.room) is not attempt:
            return
        del self._rooms[attempt.room]
        self.kept.came_free(attempt.room)
        self._finished.append(attempt)
        if len(self._finished) > self._memory:
            forgotten = self._finished.popleft()
            key = forgotten.room, forgotten.attempt_id
            if self._by_attempt_id.get(key) is forgotten:
                del self._by_attempt_id[key]
            for lease in forgotten.bindings:
                if self._by_lease.pop(lease, None) is None:
                    continue  # a decode without the plugin: nobody asks
                if forgotten.poisoned:
                    self._forgotten.poison(lease, forgotten.poisoned)
                else:
                    self._forgotten.end(lease)
