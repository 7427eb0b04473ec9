"""What the decode ledger is asked: which exposures there are, and whether it agrees with itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from sglang_scaling_fixes.reclaim.rules.causes import waits_of
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState
from sglang_scaling_fixes.reclaim.rules.types import LedgerError, Rank


class DecodeAudit:
    """The tables of `decode_ledger.DecodeLedger`, looked at and not changed."""

    group: str
    engine: int
    peers: dict[Rank, str]
    _number: int
    _exposed: dict[str, Exposure]
    _held: dict[str, Exposure]
    _rooms: dict[int, dict[str, Exposure]]
    _given_up_rooms: OrderedDict[int, str]
    _hellos: dict[Rank, int]

    def find(self, lease: str) -> Exposure | None:
        """The exposure of this lease, while its slots are not ordinary."""
        return self._exposed.get(lease) or self._held.get(lease)

    def waiting(self, room: int) -> list[Exposure]:
        """Exposures of `room` whose owners wait for their KV."""
        return [e for e in self.of_room(room) if e.state is ExposureState.EXPOSED]

    def of_room(self, room: int) -> list[Exposure]:
        """Every exposure of `room` whose slots are not ordinary, in the order of exposing."""
        return list(self._rooms.get(room, {}).values())

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

    def snapshot(self, now: float) -> Hashable:
        """All that the ledger knows; equal for ledgers that behave alike from here on.

        How often a writer was asked only spaces the questions; whether it is asked at `now`
        is told.
        """
        return (
            self._number,
            self.engine,
            self.group,
            tuple(sorted(self.peers.items())),
            tuple(e.snapshot(now) for e in self._exposed.values()),
            tuple(e.snapshot(now) for e in self._held.values()),
            tuple(self._given_up_rooms.items()),
            tuple(sorted(self._hellos.items())),
        )

    def check_integrity(self) -> None:
        """`LedgerError` where the ledger contradicts itself."""
        for lease, exposure in self._exposed.items():
            if exposure.lease != lease or exposure.state is not ExposureState.EXPOSED:
                raise LedgerError(f"{lease}: {exposure.state} among the exposed")
        for lease, exposure in self._held.items():
            if exposure.lease != lease or not exposure.given_up:
                raise LedgerError(f"{lease}: {exposure.state} among the held")
            if (exposure.state is ExposureState.PROVEN) == bool(exposure.unproven):
                raise LedgerError(
                    f"{lease}: {exposure.state} with {len(exposure.unproven)} unproven"
                )
            if exposure.waits not in (None, waits_of(exposure)):
                raise LedgerError(f"{lease}: it waits for something else than {exposure.waits}")
        by_room = {lease for exposures in self._rooms.values() for lease in exposures}
        if by_room != self._exposed.keys() | self._held.keys():
            raise LedgerError("an exposure is missing among those of its room, or is left there")
