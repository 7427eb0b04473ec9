"""The requests of one client: the same ones, in the same order, for stock and armed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from benchmarks.reclaim.degraded.cases import Aborts
from benchmarks.reclaim.degraded.known import Known, Prompts


@dataclass(frozen=True)
class Planned:
    """One request; `abort_after_s`: None for one that is to be answered."""

    known: Known
    abort_after_s: float | None


class Stream:
    """Endless. Aborts come at even distances, and not to all clients at once."""

    def __init__(
        self,
        prompts: Prompts,
        name: str,
        number: int,
        clients: int,
        *,
        aborts: Aborts | None = None,
        long_share: float = 0.0,
    ) -> None:
        self._prompts = prompts
        self._draw = random.Random(f"{name}-{number}")
        self._aborts = aborts
        self._long_share = long_share
        self._phase = (number + 1) / clients
        self._aborted = self._answered = 0

    def next(self) -> Planned:
        aborts = self._aborts
        sent = self._aborted + self._answered
        if aborts is not None and self._falls_due(sent, aborts.share):
            self._aborted += 1
            return Planned(self._known(aborts.long), self._draw.uniform(*aborts.after_s))
        long = self._falls_due(self._answered, self._long_share)
        self._answered += 1
        return Planned(self._known(long), None)

    def _known(self, long: bool) -> Known:
        return self._draw.choice(self._prompts.long if long else self._prompts.short)

    def _falls_due(self, k: int, share: float) -> bool:
        return math.floor((k + 1) * share + self._phase) > math.floor(k * share + self._phase)
