"""When each request of a trace arrives: at its own time, or after the answer before it."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Hashable

from sglang_scaling_fixes.layersplit.simulator.records import Request, Trace


class Feed:
    """`faster`: 2 brings all times and pauses of the trace twice as fast."""

    def __init__(self, trace: Trace, faster: float) -> None:
        self._faster = faster
        self._later: defaultdict[Hashable, deque[Request]] = defaultdict(deque)
        self._due: list[tuple[float, int, Request]] = []
        for number, request in enumerate(trace):
            if request.arrival is None:
                self._later[request.session].append(request)
            else:
                self._due.append((request.arrival / faster, number, request))
        heapq.heapify(self._due)
        self._number = len(self._due)

    @property
    def next(self) -> float:
        """When the next request comes, as far as is known; infinity if none is."""
        return self._due[0][0] if self._due else float("inf")

    def due(self, now: float) -> list[tuple[float, Request]]:
        """Those that have come by `now`, with the time of each; first come, first."""
        found = []
        while self._due and self._due[0][0] <= now:
            time, _, request = heapq.heappop(self._due)
            found.append((time, request))
        return found

    def answered(self, request: Request, when: float) -> None:
        """Its answer is complete at `when`: the next turn of its session will follow."""
        later = self._later[request.session]
        if later:
            following = later.popleft()
            self._number += 1
            when += following.delay / self._faster
            heapq.heappush(self._due, (when, self._number, following))

    def refused(self, request: Request) -> int:
        """It gets no answer, so the rest of its session never comes. How many these are."""
        return len(self._later.pop(request.session, ()))
