"""Which worker is asked next. No I/O and no clock: every time is a `now` in seconds.

A worker is in one of these states:

    up        is asked; the worker with the fewest requests in flight comes first
    avoided   is asked only if no other worker is left: it corrupted an answer a while ago,
              or said that it is overloaded
    down      is not asked: its connection was refused or broke. It is probed after a
              back-off, and is up again once a probe is answered

The back-off doubles until a *request* succeeds. Probes alone do not reset it, because a worker
may answer probes and still break every request.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sglang_scaling_fixes.retry.settings import Target

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
"""Seconds until a worker that is down is probed: after its first failure, and at most."""


class WorkerState(enum.StrEnum):
    UP = "up"
    AVOIDED = "avoided"
    DOWN = "down"


@dataclass(eq=False)
class Worker:
    """One target, and how its requests have fared."""

    target: Target
    in_flight: int = 0
    failures: int = 0
    """Lost connections and failed probes since its last good answer."""
    probe_at: float | None = None
    """None: it is not down. Otherwise when it is due for a probe; infinity during a probe."""
    avoided_until: float = field(default=float("-inf"))

    def state(self, now: float) -> WorkerState:
        if self.probe_at is not None:
            return WorkerState.DOWN
        return WorkerState.AVOIDED if now < self.avoided_until else WorkerState.UP


class Workers:
    """All workers, in the order they were given."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self.all = [Worker(target) for target in targets]
        self._turn = 0

    def pick(
        self, tried: Collection[Worker], now: float, *, no_pairs: bool = False
    ) -> Worker | None:
        """The next worker to ask, None if there is none. `no_pairs` leaves pairs out."""
        best: tuple[tuple[bool, int], int] | None = None
        for offset in range(len(self.all)):
            index = (self._turn + offset) % len(self.all)
            worker = self.all[index]
            state = worker.state(now)
            if state is WorkerState.DOWN or worker in tried or (no_pairs and worker.target.pair):
                continue
            rank = (state is WorkerState.AVOIDED, worker.in_flight)
            if best is None or rank < best[0]:
                best = rank, index
        if best is None:
            return None
        self._turn = (best[1] + 1) % len(self.all)  # ties rotate
        return self.all[best[1]]

    def answered(self, worker: Worker) -> None:
        """A request succeeded. A worker that broke meanwhile stays down until a probe succeeds."""
        if worker.probe_at is None:
            worker.failures = 0

    def avoid(self, worker: Worker, until: float) -> None:
        worker.avoided_until = max(worker.avoided_until, until)

    def broke(self, worker: Worker, now: float) -> bool:
        """It refused a connection, broke one, or was silent. True if it was not down before.

        All requests of a worker break together, so they lengthen the back-off once.
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
        """Whether any worker is not down."""
        return any(worker.state(now) is not WorkerState.DOWN for worker in self.all)

    @staticmethod
    def _back_off(worker: Worker, now: float) -> None:
        worker.probe_at = now + min(
            LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(worker.failures, 16)
        )
        worker.failures += 1
