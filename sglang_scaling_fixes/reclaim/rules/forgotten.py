"""What prefill still says of leases that it no longer remembers one by one.

Prefill remembers so many and no more. Decode believes "unknown" of the process that had its
destinations (`exposure.CREDENCE`), so forgetting must not make it up:

    forgotten                          asked about    its destinations, if they come (again)
    ended, and no write failed         "unknown"      dropped
    asked about, and never received    "unknown"      dropped
    poisoned                           "poisoned"     dropped

Of the last two the last `limit` leases are kept by name. For all others a number for each decode
process is enough, the *horizon*. A lease is the name of a decode process and a number that grows
in the order in which destinations are sent, and these arrive in that order. So a healthy lease
that nobody here has seen lies above the horizon of its process, and one at or below it is
treated as the worst that was forgotten there.

That errs to one side: "poisoned" of a lease that was not costs a fence, and dropped destinations
cost a request. Neither gives a slot back early. There are horizons for so many decode processes
and no more (the last that anything was forgotten of). Once one of poisoned leases is dropped,
"poisoned" is the answer for every process without one.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable

from sglang_scaling_fixes.reclaim.rules.types import lease_parts

LONG_AGO = "a write of it, or of a request of that time, failed long ago"
"""The reason given for a lease below the horizon."""


PROCESSES = 4096
"""Decode processes with a horizon."""


class Forgotten:
    """The leases that a prefill rank must still answer for, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._poisoned: OrderedDict[str, str] = OrderedDict()
        """Lease -> the write that failed."""
        self._refused: OrderedDict[str, None] = OrderedDict()
        """Leases that were asked about before their destinations came."""
        self._poisoned_up_to: OrderedDict[str, int] = OrderedDict()
        self._refused_up_to: OrderedDict[str, int] = OrderedDict()
        """Decode process -> the horizon."""
        self._everywhere = False
        """A horizon of poisoned leases was forgotten itself."""

    def end(self, lease: str) -> None:
        """An attempt with this lease is forgotten: it is over, and no write of it failed."""
        _raise_to(self._refused_up_to, lease)

    def poison(self, lease: str, reason: str) -> None:
        """A poisoned attempt with this lease is forgotten."""
        self._poisoned[lease] = sys.intern(reason)  # few, for very many leases
        if len(self._poisoned) > self._limit:
            oldest, _ = self._poisoned.popitem(last=False)
            if _raise_to(self._poisoned_up_to, oldest):
                self._everywhere = True

    def refuse(self, lease: str) -> None:
        """Nothing was received for `lease`, and from here on nothing will be accepted."""
        self._refused[lease] = None
        if len(self._refused) > self._limit:
            oldest, _ = self._refused.popitem(last=False)
            _raise_to(self._refused_up_to, oldest)

    def poisoned(self, lease: str) -> str:
        """Why "unknown" must not be said of a lease that is not remembered. Empty: it may be."""
        if (reason := self._poisoned.get(lease)) is not None:
            return reason
        process, number = lease_parts(lease)
        horizon = self._poisoned_up_to.get(process, -1)
        return LONG_AGO if number <= horizon or (self._everywhere and horizon < 0) else ""

    def refuses(self, lease: str) -> bool:
        """Destinations of a lease that is not remembered have come: must they be dropped?"""
        if lease in self._refused or lease in self._poisoned:
            return True
        if not (self._refused_up_to or self._poisoned_up_to):
            return False
        process, number = lease_parts(lease)
        horizons = (self._refused_up_to, self._poisoned_up_to)
        return any(number <= horizon.get(process, -1) for horizon in horizons)

    def sizes(self) -> dict[str, int]:
        """Entries in each table."""
        return {
            "poisoned": len(self._poisoned),
            "refused": len(self._refused),
            "horizons": len(self._poisoned_up_to) + len(self._refused_up_to),
        }

    def snapshot(self) -> Hashable:
        """All that it knows."""
        return (
            tuple(self._poisoned),
            tuple(self._refused),
            tuple(self._poisoned_up_to.items()),
            tuple(self._refused_up_to.items()),
            self._everywhere,
        )


def _raise_to(horizons: OrderedDict[str, int], lease: str) -> bool:
    """Raise the horizon of the lease's process to it. True: another one was forgotten for it."""
    process, number = lease_parts(lease)
    horizons[process] = max(number, horizons.get(process, -1))
    horizons.move_to_end(process)
    if len(horizons) <= PROCESSES:
        return False
    horizons.popitem(last=False)
    return True
