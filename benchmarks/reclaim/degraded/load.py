"""Clients of both prefills for a while; what is in flight at the end is hung up and not counted."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reclaim.degraded.cases import Case
from benchmarks.reclaim.degraded.counts import AILING, Record, judge
from benchmarks.reclaim.degraded.exchange import Abort, Answer, Router
from benchmarks.reclaim.degraded.known import NEW_TOKENS, Prompts
from benchmarks.reclaim.degraded.stream import Planned, Stream
from benchmarks.reclaim.load import Ends
from sglang_scaling_fixes.lab.servers.pending import greedy


@dataclass(frozen=True)
class Pressure:
    """How much is asked; `pace_s`: a client begins at most one request in so many seconds.

    Both prefills and decode share the machine's cores here, and a fleet's do not. Without a pace,
    what one prefill answers more would be taken from what the other one answers.
    """

    seconds: float
    clients: int  # of each prefill
    pace_s: float
    limit_s: float  # a request without an answer by then has failed


@dataclass
class Load:
    """The clients of one half in one case. `ends`: where to send, by prefill."""

    case: Case
    ends: Mapping[str, Ends]
    prompts: Prompts
    pressure: Pressure
    seed: int
    rooms: itertools.count[int]
    records: list[Record] = field(default_factory=list)

    async def run(self) -> list[Record]:
        began = time.monotonic()
        async with Router.opened(self.pressure.limit_s) as router:
            clients = [
                asyncio.create_task(self._client(router, prefill, number, began))
                for prefill in self.ends
                for number in range(self.pressure.clients)
            ]
            done, going_on = await asyncio.wait(clients, timeout=self.pressure.seconds)
            for client in going_on:
                client.cancel()
            await asyncio.gather(*going_on, return_exceptions=True)
            for client in done:
                client.result()  # a client goes on for ever, unless it has an error
        return self.records

    async def _client(self, router: Router, prefill: str, number: int, began: float) -> None:
        pressure, name = self.pressure, f"{self.seed}-{self.case.name}-{prefill}"
        aborts, long_share = None, 0.0
        if prefill == AILING:
            aborts, long_share = self.case.aborts, self.case.long_share
        stream = Stream(
            self.prompts, name, number, pressure.clients, aborts=aborts, long_share=long_share
        )
        await asyncio.sleep(pressure.pace_s * number / pressure.clients)
        while True:
            sent, planned = time.monotonic(), stream.next()
            answer = await self._ask(router, prefill, planned)
            ended = time.monotonic()
            outcome, why = judge(answer, planned.known.ids, planned.abort_after_s is not None)
            self.records.append(Record(prefill, ended - began, outcome, why))
            await asyncio.sleep(max(answer.retry_after_s, sent + pressure.pace_s - ended, 0.0))

    async def _ask(self, router: Router, prefill: str, planned: Planned) -> Answer:
        ends, abort = self.ends[prefill], None
        if self.case.aborts is not None and planned.abort_after_s is not None:
            abort = Abort(self.case.aborts.at, planned.abort_after_s)
        return await router.ask(ends, payload(ends, planned.known.prompt, next(self.rooms)), abort)


def payload(ends: Ends, prompt: tuple[int, ...], room: int) -> dict[str, Any]:
    """The JSON of one request for both servers."""
    return {
        **greedy(prompt, NEW_TOKENS),
        "rid": f"degraded-{room}",
        "bootstrap_host": ends.prefill.address,
        "bootstrap_port": ends.bootstrap_port,
        "bootstrap_room": room,
    }
