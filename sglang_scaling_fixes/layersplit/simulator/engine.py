"""The replay: requests queue, forward passes compute them, decode takes their KV.

One pass after the other. A pass has at most a chunk of new tokens: first what is left of the
request that the last one began, then requests in the order of their arrival, while chunk, pool and
scratch have room for them. The first that does not fit waits, and all behind it.

A request holds the blocks of its whole prompt from its admission until decode has its KV, which
is sent pass by pass, one request after the other. The blocks stay in the LRU after that, and in
the host's, if there is one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_scaling_fixes.layersplit.planner.capacity import Pool
from sglang_scaling_fixes.layersplit.planner.models import PAGE, pages
from sglang_scaling_fixes.layersplit.planner.traffic import Forward
from sglang_scaling_fixes.layersplit.simulator import cost
from sglang_scaling_fixes.layersplit.simulator.cache import PrefixCache
from sglang_scaling_fixes.layersplit.simulator.deployment import Deployment
from sglang_scaling_fixes.layersplit.simulator.feed import Feed
from sglang_scaling_fixes.layersplit.simulator.records import Request, Trace

Progress = Callable[[int, int], None]
"""Takes how many requests are done, and of how many."""


@dataclass(frozen=True)
class Answer:
    """Seconds from the trace's start. `ended`: the first token is there, and all KV is computed."""

    request: Request
    arrived: float
    ended: float
    hit: int
    """Tokens of its prefix that the pool had."""
    loaded: int
    """Tokens that came from the host behind these."""


@dataclass
class Outcome:
    """Seconds and tokens of a whole replay."""

    answers: list[Answer] = field(default_factory=list)
    refused: int = 0
    """Requests longer than the pool or than is read, and those that would have followed them."""
    compute: float = 0.0
    broadcast: float = 0.0
    load: float = 0.0
    passes: int = 0
    began: float = 0.0
    ended: float = 0.0
    """Of the last pass."""
    most_held: int = 0
    """Requests that held KV at once."""


@dataclass
class _Running:
    request: Request
    arrived: float
    hit: int
    loaded: int
    done: int
    """Tokens computed, or found."""
    sent: int = 0
    """Tokens that are known to the cache and on their way to decode."""


class Replay:
    """One trace through one deployment."""

    def __init__(
        self,
        trace: Trace,
        pool: Pool,
        deployment: Deployment,
        rates: cost.Rates,
        faster: float = 1.0,
        *,
        endless: bool = False,
    ) -> None:
        """`endless`: each prefix that came before is found, whatever the capacity: an ablation."""
        self._requests = len(trace)
        self._pool, self._deployment, self._rates = pool, deployment, rates
        self._feed = Feed(trace, faster)
        self._cache = PrefixCache(deployment.cached)
        self._host = PrefixCache(2**62 if endless else deployment.host)
        self._endless = endless
        self._queue: deque[tuple[float, Request]] = deque()
        self._unfinished: _Running | None = None
        self._leaving: list[tuple[float, int, Request]] = []
        """Their KV is on the way to decode, until when."""
        self._link = 0.0
        """When the way to decode is free."""
        self._outcome = Outcome()

    def run(self, progress: Progress = lambda done, of: None) -> Outcome:
        now = self._feed.next
        outcome = self._outcome
        outcome.began = now if now < float("inf") else 0.0
        while True:
            self._arrive(now)
            self._leave(now)
            batch = self._admit()
            if batch:
                now = self._compute(now, batch)
                progress(len(outcome.answers) + outcome.refused, self._requests)
                continue
            now = min(self._feed.next, self._leaving[0][0] if self._leaving else float("inf"))
            if now == float("inf"):
                break
        return outcome

    def _arrive(self, now: float) -> None:
        for arrived, request in self._feed.due(now):
            if request.prompt > self._deployment.longest or self._never_fits(request):
                self._outcome.refused += 1 + self._feed.refused(request)
            else:
                self._queue.append((arrived, request))

    def _never_fits(self, request: Request) -> bool:
        needed = sum(request.room(number) for number in range(len(request.blocks)))
        return needed > self._deployment.running

    def _leave(self, now: float) -> None:
        while self._leaving and self._leaving[0][0] <= now:
            self._cache.release(heapq.heappop(self._leaving)[2])

    def _admit(self) -> list[tuple[_Running, int]]:
        """The next pass: requests, and how many new tokens of each."""
        batch: list[tuple[_Running, int]] = []
        left, prefixes = self._pool.chunk, 0
        if self._unfinished is not None:
            left = self._add(batch, self._unfinished, left)
            prefixes = PAGE * pages(self._unfinished.done)
            self._unfinished = None
        while left and self._queue:
            arrived, request = self._queue[0]
            held = self._cache.held  # nothing held: alone it fits, see `_never_fits`
            if held and held + self._cache.needed(request) > self._deployment.running:
                break
            hit, loaded = self._found(request)
            prefixes += PAGE * pages(hit + loaded)
            limit = self._deployment.scratch
            if limit is not None and batch and prefixes > limit:
                break
            self._queue.popleft()
            self._cache.hold(request)
            left = self._add(batch, _Running(request, arrived, hit, loaded, hit + loaded), left)
        holding = len(batch) + len(self._leaving)
        self._outcome.most_held = max(self._outcome.most_held, holding)
        return batch

    def _found(self, request: Request) -> tuple[int, int]:
        """Tokens of the prefix in the pool, and behind them in the host. One token is computed
        even if all are there."""
        most = request.prompt - 1
        hit = min(self._cache.found(request), most)
        behind = min(self._host.found(request), most)
        if self._endless:
            return max(hit, behind), 0
        return hit, max(behind - hit, 0)

    @staticmethod
    def _add(batch: list[tuple[_Running, int]], running: _Running, left: int) -> int:
        new = min(left, running.request.prompt - running.done)
        batch.append((running, new))
        return left - new

    def _compute(self, now: float, batch: list[tuple[_Running, int]]) -> float:
        """Run the pass. When it ends."""
        outcome = self._outcome
        starting = sum(one.loaded for one, _ in batch if one.done == one.hit + one.loaded)
        parts = [Forward(one.done, new) for one, new in batch]
        seconds = cost.of_pass(parts, starting, self._pool, self._deployment, self._rates)
        outcome.passes += 1
        outcome.compute += seconds.compute
        outcome.broadcast += seconds.broadcast
        outcome.load += seconds.load
        now += seconds.total
        outcome.ended = now
        for one, new in batch:
            one.done += new
            self._cache.computed(one.request, one.done, one.sent)
            self._send(now, one)
            if one.done == one.request.prompt:
                self._end(now, one)
            else:
                self._unfinished = one
        return now

    def _send(self, now: float, one: _Running) -> None:
        self._link = max(self._link, now) + cost.sent_seconds(
            one.done - one.sent, self._pool, self._rates
        )
        one.sent = one.done

    def _end(self, now: float, one: _Running) -> None:
        request, outcome = one.request, self._outcome
        outcome.answers.append(Answer(request, one.arrived, now, one.hit, one.loaded))
        until = self._link + self._rates.hold * request.prompt
        heapq.heappush(self._leaving, (until, len(outcome.answers), request))
        if self._host.tokens:
            self._host.hold(request)
            self._host.computed(request, request.prompt)
            self._host.release(request)
        self._feed.answered(request, until + self._rates.output_token * request.output)
