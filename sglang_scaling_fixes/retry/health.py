"""Health: probes of all workers all the time, and the proxy's own report."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from sglang_scaling_fixes.retry.settings import ProxySettings
from sglang_scaling_fixes.retry.telemetry import log
from sglang_scaling_fixes.retry.workers import Worker, Workers

TICK_S = 0.25
"""Between two looks at which workers are due."""


class HealthProber:
    """The time limit is above stock's own of 20 s, in which a /health generates a token."""

    def __init__(
        self, workers: Workers, session: aiohttp.ClientSession, settings: ProxySettings
    ) -> None:
        self._workers = workers
        self._session = session
        self._settings = settings
        self._probes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled: probe every worker when it is due, all at once."""
        try:
            while True:
                for worker in self._workers.due(time.monotonic()):
                    probe = asyncio.create_task(self._probe(worker))
                    self._probes.add(probe)
                    probe.add_done_callback(self._probes.discard)
                await asyncio.sleep(TICK_S)
        finally:
            for probe in self._probes:
                probe.cancel()
            await asyncio.gather(*self._probes, return_exceptions=True)

    async def _probe(self, worker: Worker) -> None:
        alive = False
        changed = False
        try:
            alive = await self._healthy(worker)
        finally:
            interval = self._settings.probe_interval
            changed = self._workers.probed(worker, alive, time.monotonic(), interval)
        if changed:
            log(event="up" if alive else "down", worker=worker.name, reason="probe")

    async def _healthy(self, worker: Worker) -> bool:
        """Whether it answers, with a status below 500."""
        limit = aiohttp.ClientTimeout(total=self._settings.probe_timeout)
        url = worker.server.url + "/health"
        try:
            async with self._session.get(url, timeout=limit) as response:
                return response.status < 500
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False


def health_report(workers: Workers, *, draining: bool, names: bool) -> tuple[int, bytes]:
    """Status and JSON body of the proxy's own /health: 200 while any worker is live.

    `draining`: no new requests are wanted. `names`: with each worker's address and state, which
    are nothing for clients.
    """
    now = time.monotonic()
    live = workers.live(now)
    said: dict[str, object] = {"live": live, "draining": draining, "workers": len(workers.all)}
    if names:
        said["workers"] = [
            {
                "worker": worker.name,
                "role": worker.server.role.value,
                "state": worker.state(now).value,
                "in_flight": worker.in_flight,
            }
            for worker in workers.all
        ]
    return 200 if live and not draining else 503, json.dumps(said).encode()
