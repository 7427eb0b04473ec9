"""What is held, put together by what it waits for: many holds have few causes.

A prefill that falls silent leaves thousands of holds that wait for the same ranks. What is
said of them, and what follows from them, is worked out once for each cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.types import Rank


class Wait(NamedTuple):
    """One writer whose proof is missing."""

    rank: Rank
    meant_for: str | None
    """The process that has or had the destinations, as far as anybody knows."""
    stuck: bool
    """It answered, and that proved nothing."""
    poisoned: bool
    """A write of it failed, and may still land."""
    known: bool
    """It ran safe reclaim when it had the destinations."""


@dataclass(frozen=True, eq=False)
class Cause:
    """What some exposures wait for. Without waits: only for the other TP ranks."""

    waits: tuple[Wait, ...]
    held: list[Exposure] = field(default_factory=list)
    """Those that wait for it, in the order of giving up."""

    @property
    def oldest(self) -> Exposure:
        return self.held[0]

    @property
    def tokens(self) -> int:
        """Token slots withheld."""
        return sum(exposure.tokens for exposure in self.held)

    @property
    def ranks(self) -> list[Rank]:
        return [wait.rank for wait in self.waits]


_FACTS = attrgetter("rank", "incarnation", "bound_by", "reported", "poisoned", "stuck")
"""Of a writer, all that a `Wait` follows from."""
_MOST_KNOWN = 4096


class Causes:
    """Remembers of each exposure what it waits for, until something about it changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Wait, ...]] = {}
        """Facts of the unproven writers -> what is waited for. Equal ones are one object."""

    def of(self, held: Iterable[Exposure]) -> list[Cause]:
        """Their causes, by the oldest exposure of each."""
        found: dict[int, Cause] = {}
        for exposure in held:
            waits = exposure.waits
            if waits is None:
                waits = exposure.waits = self._found(exposure)
            cause = found.get(id(waits))  # the tuples are told apart by identity: hashing is slow
            if cause is None:
                cause = found[id(waits)] = Cause(waits)
            cause.held.append(exposure)
        if len(self._known) > _MOST_KNOWN:
            self._known = {cause.waits: cause.waits for cause in found.values()}
        return list(found.values())

    def _found(self, exposure: Exposure) -> tuple[Wait, ...]:
        unproven = exposure.unproven
        heard = min([writer.writes_at for writer in unproven], default=0.0)
        exposure.last_word = max(exposure.gave_up_at, heard)
        facts = tuple(map(_FACTS, unproven))
        waits = self._known.get(facts)
        if waits is None:
            found = waits_of(exposure)
            waits = self._known[facts] = self._known.setdefault(found, found)
        return waits


def waits_of(exposure: Exposure) -> tuple[Wait, ...]:
    """What an exposure waits for, found anew."""
    return tuple(
        Wait(w.rank, w.meant_for, bool(w.stuck), w.poisoned, w.known) for w in exposure.unproven
    )
