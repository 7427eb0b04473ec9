"""Health: probes of the workers that are down, and the proxy's own report."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from sglang_scaling_fixes.retry.telemetry import log
from sglang_scaling_fixes.retry.workers import Worker, Workers

PROBE_S = 10.0
"""How long a worker may take to answer a probe: a stock /health may generate a token first."""
TICK_S = 0.25
"""Between two looks at which workers are due."""


class HealthProber:
    def __init__(self, workers: Workers, session: aiohttp.ClientSession) -> None:
        self._workers = workers
        self._session = session
        self._probes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled: probe every worker when it is due, all at once."""
        try:
            while True:
                await asyncio.sleep(TICK_S)
                for worker in self._workers.due(time.monotonic()):
                    probe = asyncio.create_task(self._probe(worker))
                    self._probes.add(probe)
                    probe.add_done_callback(self._probes.discard)
        finally:
            for probe in self._probes:
                probe.cancel()
            await asyncio.gather(*self._probes, return_exceptions=True)

    async def _probe(self, worker: Worker) -> None:
        alive = False
        try:
            alive = await self._healthy(worker)
        finally:
            self._workers.probed(worker, alive, time.monotonic())
        if alive:
            log(event="up", worker=worker.target.name)

    async def _healthy(self, worker: Worker) -> bool:
        """Whether all servers of the target answer, with a status below 500."""
        limit = aiohttp.ClientTimeout(total=PROBE_S)
        for url in worker.target.urls:
            try:
                async with self._session.get(url + "/health", timeout=limit) as response:
                    if response.status >= 500:
                        return False
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False
        return True


def health_report(workers: Workers) -> tuple[int, bytes]:
    """Status and JSON body of the proxy's own /health: 200 while any worker is live."""
    now = time.monotonic()
    states = [
        {"worker": w.target.name, "state": w.state(now).value, "in_flight": w.in_flight}
        for w in workers.all
    ]
    live = workers.live(now)
    return 200 if live else 503, json.dumps({"live": live, "workers": states}).encode()
