"""Which servers are asked next. No I/O and no clock: every time is a `now` in seconds.

A worker is in one of these states:

    up        is asked first
    avoided   is asked if no other is left: it corrupted an answer, said that it is overloaded,
              lost a connection a while ago, or has never answered yet
    down      is asked if none of the others is left: a probe failed, or requests broke on it
              that other workers then served

All workers are probed all the time. One that is down is probed with a back-off. The back-off
doubles until a *request* succeeds. Probes alone do not reset it, because a worker may answer
probes and still break every request.

A request that breaks is evidence against itself first: it may be what breaks workers. So a break
only makes its worker avoided, and due for a probe. It counts against the worker once another one
has served the same request.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from sglang_scaling_fixes.retry.servers import Role, Server

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
"""Seconds until a worker that is down is probed: after its first failure, and at most."""
SUSPECT_S = 2.0
"""How long a worker is avoided after a broken connection."""
JUDGED, CONVICTED = 10, 5
"""A worker is down if this many (the second) of its last requests (the first) broke on it alone."""
FULL = 1.25
"""Bounded load: a worker with more than this multiple of the mean load is passed over."""


class WorkerState(enum.StrEnum):
    UP = "up"
    AVOIDED = "avoided"
    DOWN = "down"


_ORDER = {state: rank for rank, state in enumerate(WorkerState)}


class Serves(enum.Enum):
    """Which servers can answer a request."""

    ALL = "all"
    """Workers, and a prefill together with a decode."""
    ALONE = "alone"
    """Workers, and a decode by itself: the request needs no KV."""
    WORKERS = "workers"
    """Only servers that are no half."""


@dataclass(eq=False)
class Worker:
    """One server, and how its requests have fared."""

    server: Server
    place: int = 0
    """In the list."""
    in_flight: int = 0
    answered: bool = False
    """A probe or a request has succeeded once."""
    down: bool = False
    failures: int = 0
    """How often it was found down since its last good answer."""
    probe_at: float = float("-inf")
    """When it is due for a probe; infinity during one."""
    avoided_until: float = float("-inf")
    broken: deque[bool] = field(default_factory=lambda: deque(maxlen=JUDGED))
    """Of its last requests: whether it alone broke them."""

    @property
    def name(self) -> str:
        return self.server.url

    def state(self, now: float) -> WorkerState:
        if self.down:
            return WorkerState.DOWN
        avoided = now < self.avoided_until or not self.answered
        return WorkerState.AVOIDED if avoided else WorkerState.UP


@dataclass(frozen=True)
class Team:
    """Who serves one attempt: `answering` is what the client hears."""

    answering: Worker
    prefill: Worker | None = None

    @property
    def members(self) -> tuple[Worker, ...]:
        return (self.answering,) if self.prefill is None else (self.prefill, self.answering)

    @property
    def name(self) -> str:
        """The name in logs."""
        return "+".join(worker.name for worker in self.members)


@dataclass
class Tried:
    """Whom one request was asked of: `blamed` are the workers that failed it for certain."""

    teams: list[Team] = field(default_factory=list)
    blamed: set[Worker] = field(default_factory=set)

    def uses(self, worker: Worker) -> int:
        return sum(worker in team.members for team in self.teams)


class Workers:
    """All workers, in the order they were given."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self.all = [Worker(server) for server in servers]
        self._number()
        self._turns: dict[Role, int] = dict.fromkeys(Role, 0)
        """By role, the place after the one that was asked last: equal ones take turns."""

    def replace(self, servers: Iterable[Server]) -> tuple[list[Server], list[Server]]:
        """A new list: those that came and those that went. Those that stay keep their state.

        One that went is asked no more; its running requests go on.
        """
        known = {worker.server: worker for worker in self.all}
        wanted = list(dict.fromkeys(servers))
        self.all = [known.get(server) or Worker(server) for server in wanted]
        self._number()
        kept = set(wanted)
        return [s for s in wanted if s not in known], [s for s in known if s not in kept]

    def _number(self) -> None:
        for place, worker in enumerate(self.all):
            worker.place = place

    def pick(
        self, tried: Tried, now: float, *, serves: Serves = Serves.ALL, key: bytes = b""
    ) -> Team | None:
        """The next ones to ask, None if nobody is left.

        `key`: requests with the same key come to the same workers, as long as these are up and
        not much busier than the others. Without one the worker with the fewest requests is next.
        """
        best: tuple[tuple[float, ...], Team] | None = None
        for ranked in self._teams(tried, now, serves, key):
            if best is None or ranked[0] < best[0]:
                best = ranked
        if best is None:
            return None
        for worker in best[1].members:
            self._turns[worker.server.role] = worker.place + 1
        return best[1]

    def _teams(
        self, tried: Tried, now: float, serves: Serves, key: bytes
    ) -> Iterator[tuple[tuple[float, ...], Team]]:
        """The best of each kind, with its rank: the least is the best."""
        single = [w for w in self.all if w.server.role is Role.WORKER]
        if serves is Serves.ALONE:
            single += [w for w in self.all if w.server.role is Role.DECODE]
        for rank, worker in self._ranked(single, tried, now, key)[:1]:
            yield rank, Team(worker)
        if serves is not Serves.ALL:
            return
        halves: dict[str, tuple[list[Worker], list[Worker]]] = {}
        for worker in self.all:
            if worker.server.role is not Role.WORKER:
                both = halves.setdefault(worker.server.group, ([], []))
                both[worker.server.role is Role.DECODE].append(worker)
        for prefills, decodes in halves.values():
            # The cached prefix is prefill's; a decode is chosen by its load alone.
            ours = self._ranked(prefills, tried, now, key)
            theirs = self._ranked(decodes, tried, now, b"")
            for rank, team in (
                ((max(p[0], d[0]), *p[1:]), Team(decode, prefill))
                for p, prefill in ours
                for d, decode in theirs
            ):
                if team not in tried.teams:
                    yield rank, team
                    break

    def _ranked(
        self, workers: list[Worker], tried: Tried, now: float, key: bytes
    ) -> list[tuple[tuple[float, ...], Worker]]:
        """Those that may be asked, the best first."""
        live = [w for w in workers if not w.down] or workers
        mean = (sum(w.in_flight for w in live) + 1) / len(live) if live else 0.0
        found: list[tuple[tuple[float, ...], Worker]] = []
        for worker in workers:
            uses = tried.uses(worker)
            if worker in tried.blamed or (uses and worker.server.role is Role.WORKER):
                continue
            full = worker.in_flight + 1 > math.ceil(FULL * mean)
            state = worker.state(now)
            if state is WorkerState.UP and full:
                state = WorkerState.AVOIDED  # no better than one that is only doubted
            if key:
                order = (float(full), -_score(key, worker.name))
            else:
                place = worker.place - self._turns[worker.server.role]
                order = (worker.in_flight, place % len(self.all))
            found.append(((_ORDER[state], uses, *order), worker))
        found.sort(key=lambda ranked: ranked[0])
        return found

    # -- what requests tell --------------------------------------------------------------------

    def served(self, worker: Worker) -> None:
        """It answered a request well. One that is down stays so until a probe succeeds."""
        worker.answered = True
        worker.broken.append(False)
        if not worker.down:
            worker.failures = 0

    def avoid(self, worker: Worker, until: float) -> None:
        worker.avoided_until = max(worker.avoided_until, until)

    def acquitted(self, worker: Worker) -> None:
        """It was the request."""
        worker.avoided_until = float("-inf")

    def broke(self, worker: Worker, now: float) -> None:
        """It refused a connection, broke one, or was silent: a probe will tell."""
        self.avoid(worker, now + SUSPECT_S)
        if not worker.down and math.isfinite(worker.probe_at):
            worker.probe_at = now

    def convicted(self, worker: Worker, now: float) -> bool:
        """Another worker served what it broke. True if it is down by that.

        The last one that is not down stays, however bad: to ask it is better than to ask nobody.
        """
        worker.broken.append(True)
        if sum(worker.broken) < CONVICTED or worker.down or not self._others(worker):
            return False
        worker.broken.clear()
        self._take_down(worker, now)
        return True

    def _others(self, worker: Worker) -> bool:
        role = worker.server.role
        return any(w is not worker and not w.down and w.server.role is role for w in self.all)

    # -- what probes tell ----------------------------------------------------------------------

    def due(self, now: float) -> list[Worker]:
        """The workers to probe now. Each is returned once, until `probed`."""
        found = [worker for worker in self.all if worker.probe_at <= now]
        for worker in found:
            worker.probe_at = float("inf")
        return found

    def probed(self, worker: Worker, alive: bool, now: float, interval: float) -> bool:
        """True if that changed whether it is down. `interval`: seconds to the next probe."""
        before = worker.down
        if alive:
            worker.down, worker.answered, worker.probe_at = False, True, now + interval
        else:
            self._take_down(worker, now)
        return worker.down is not before

    def live(self, now: float) -> bool:
        """Whether any team could answer: its servers have answered once, and are not down."""
        up = [worker for worker in self.all if worker.answered and not worker.down]
        roles = {(worker.server.role, worker.server.group) for worker in up}
        return any(
            role is Role.WORKER or (role is Role.DECODE and (Role.PREFILL, group) in roles)
            for role, group in roles
        )

    @staticmethod
    def _take_down(worker: Worker, now: float) -> None:
        worker.down = True
        wait = FIRST_BACKOFF_S * 2 ** min(worker.failures, 16)
        worker.probe_at = now + min(LONGEST_BACKOFF_S, wait)
        worker.failures += 1


def _score(key: bytes, name: str) -> int:
    """Rendezvous hashing: a worker that leaves moves its own keys only."""
    return int.from_bytes(blake2b(key + name.encode(), digest_size=6).digest())
