"""Which worker is asked next. No I/O and no clock: every time is a `now` in seconds.

A worker is one of

    up        asked, the one with the fewest requests in flight first
    avoided   asked only if nothing else is left: it spoiled an answer a while ago, or
              said that it is overloaded
    down      not asked: its connection was refused or broke. It is probed after a
              back-off, and up again once a probe is answered

The back-off doubles until a *request* went well: a worker that answers probes and
then breaks every request is not believed anew each time.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sglang_scaling_fixes.retry.settings import Target

FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
"""Seconds until a worker that broke is probed."""


class State(enum.StrEnum):
    UP = "up"
    AVOIDED = "avoided"
    DOWN = "down"


@dataclass(eq=False)
class Worker:
    """One target and what became of the requests it was given."""

    target: Target
    in_flight: int = 0
    failures: int = 0
    """Breaks and failed probes since its last good answer."""
    probe_at: float | None = None
    """None: not down. Otherwise when it may be probed; infinity while it is."""
    avoided_until: float = field(default=float("-inf"))

    def state(self, now: float) -> State:
        if self.probe_at is not None:
            return State.DOWN
        return State.AVOIDED if now < self.avoided_until else State.UP


class Workers:
    """All workers, in the order they were given."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self.all = [Worker(target) for target in targets]
        self._turn = 0

    def pick(self, tried: Collection[Worker], now: float, *, alone: bool = False) -> Worker | None:
        """The next worker to ask, or None. `alone`: no pairs, which cannot serve this."""
        best: tuple[tuple[bool, int], int] | None = None
        for offset in range(len(self.all)):
            index = (self._turn + offset) % len(self.all)
            worker = self.all[index]
            state = worker.state(now)
            if state is State.DOWN or worker in tried or (alone and worker.target.pair):
                continue
            rank = (state is State.AVOIDED, worker.in_flight)
            if best is None or rank < best[0]:
                best = rank, index
        if best is None:
            return None
        self._turn = (best[1] + 1) % len(self.all)  # ties rotate
        return self.all[best[1]]

    def answered(self, worker: Worker) -> None:
        """A request went well. Says nothing of a worker that broke since: a probe will."""
        if worker.probe_at is None:
            worker.failures = 0

    def avoid(self, worker: Worker, until: float) -> None:
        worker.avoided_until = max(worker.avoided_until, until)

    def broke(self, worker: Worker, now: float) -> bool:
        """Refused, broken or silent. True if it was not down before.

        All requests of a worker break with it; they are one reason to wait, not many.
        """
        if worker.probe_at is not None:
            return False
        self._back_off(worker, now)
        return True

    def due(self, now: float) -> list[Worker]:
        """The workers to probe now. Each is returned once, until `probed`."""
        found = [w for w in self.all if w.probe_at is not None and w.probe_at <= now]
        for worker in found:
            worker.probe_at = float("inf")
        return found

    def probed(self, worker: Worker, alive: bool, now: float) -> None:
        if alive:
            worker.probe_at = None
        else:
            self._back_off(worker, now)

    def live(self, now: float) -> bool:
        """Whether any would be asked."""
        return any(worker.state(now) is not State.DOWN for worker in self.all)

    @staticmethod
    def _back_off(worker: Worker, now: float) -> None:
        worker.probe_at = now + min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(worker.failures, 16))
        worker.failures += 1
