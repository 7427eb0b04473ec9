"""What tests and audits ask of the prefill ledger: all of it, and whether it agrees with itself."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

from sglang_scaling_fixes.reclaim.rules.attempt import Attempt
from sglang_scaling_fixes.reclaim.rules.ended_rooms import EndedRooms
from sglang_scaling_fixes.reclaim.rules.forgotten import Forgotten
from sglang_scaling_fixes.reclaim.rules.kept_back import KeptBack
from sglang_scaling_fixes.reclaim.rules.refused_rooms import RefusedRooms
from sglang_scaling_fixes.reclaim.rules.types import LedgerError


class PrefillAudit:
    """The tables of `prefill_ledger.PrefillLedger`, looked at and not changed."""

    _rooms: dict[int, Attempt]
    _by_attempt_id: dict[tuple[int, str], Attempt]
    _by_lease: dict[str, Attempt]
    _senders: dict[Hashable, Attempt]
    _waiting: dict[int, deque[Hashable]]
    _finished: deque[Attempt]
    _unsent: OrderedDict[Attempt, None]
    _unserved: OrderedDict[Attempt, None]
    refused_rooms: RefusedRooms
    ended_rooms: EndedRooms
    _forgotten: Forgotten
    kept: KeptBack

    def attempts(self) -> list[Attempt]:
        """The attempts that rooms serve now, by room."""
        return [attempt for _, attempt in sorted(self._rooms.items())]

    def attempt_of(self, lease: str) -> Attempt | None:
        """The attempt that this lease's destinations belong to, while it is remembered."""
        return self._by_lease.get(lease)

    def poisoned(self, lease: str) -> str:
        """Why an answer about `lease` proves nothing; empty if it does."""
        attempt = self._by_lease.get(lease)
        return self._forgotten.poisoned(lease) if attempt is None else attempt.poisoned

    def waiting_senders(self) -> list[Hashable]:
        """Senders that came before the destinations of their attempt."""
        return [sender for waiting in self._waiting.values() for sender in waiting]

    def sizes(self) -> dict[str, int]:
        """Entries in each table, by its name."""
        return {
            "rooms": len(self._rooms),
            "attempt_ids": len(self._by_attempt_id),
            "leases": len(self._by_lease),
            "senders": len(self._senders),
            "waiting": sum(map(len, self._waiting.values())),
            "finished": len(self._finished),
            "unsent": len(self._unsent),
            "unserved": len(self._unserved),
            "rooms_refused": len(self.refused_rooms),
            "rooms_ended": len(self.ended_rooms),
            "kept": len(self.kept),
            **self._forgotten.sizes(),
        }

    def snapshot(self, name: Callable[[Attempt], Hashable]) -> Hashable:
        """All that the ledger knows; equal for ledgers that behave alike from here on.

        `name(attempt)`: what stands for an attempt, the same whenever it is met again.
        """
        return (
            tuple((room, name(a)) for room, a in sorted(self._rooms.items())),
            tuple((lease, name(a)) for lease, a in sorted(self._by_lease.items())),
            tuple((key, name(a)) for key, a in sorted(self._by_attempt_id.items())),
            tuple((sender, name(a)) for sender, a in sorted(self._senders.items(), key=str)),
            tuple((room, *waiting) for room, waiting in sorted(self._waiting.items())),
            tuple(name(a) for a in self._unsent),
            tuple(name(a) for a in self._unserved),
            tuple(name(a) for a in self._finished),
            self.refused_rooms.snapshot(),
            self.ended_rooms.snapshot(),
            self._forgotten.snapshot(),
            self.kept.snapshot(),
        )

    def check_integrity(self) -> None:
        """`LedgerError` where the ledger contradicts itself."""
        for (room, attempt_id), attempt in self._by_attempt_id.items():
            if (attempt.room, attempt.attempt_id) != (room, attempt_id):
                raise LedgerError(f"room {room}: an attempt of room {attempt.room} stands for it")
        for room, attempt in self._rooms.items():
            if self._by_attempt_id.get((room, attempt.attempt_id)) is not attempt:
                raise LedgerError(f"room {room}: its attempt is not the one its destinations name")
            if (attempt in self._unserved) != (attempt.sender is None and not attempt.closed):
                raise LedgerError(f"room {room}: does its attempt wait for a request?")
        for sender, attempt in self._senders.items():
            if attempt.sender != sender:
                raise LedgerError(f"room {attempt.room}: a sender that is not its own")
        for attempt in (*self._unsent, *self._unserved):
            if (attempt in self._unsent) != attempt.closed or attempt.sender is not None:
                raise LedgerError(f"room {attempt.room}: given up before its request came?")
        for attempt in self._finished:
            if not attempt.over or self._rooms.get(attempt.room) is attempt:
                raise LedgerError(f"room {attempt.room}: finished, and not over")
        for room in self.kept.stranded({r: not a.over for r, a in self._rooms.items()}):
            raise LedgerError(f"room {room} is free, and what waits for it is not tried")
