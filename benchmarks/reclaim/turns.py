"""Two warm pairs of servers that take turns of a fraction of a second on one machine.

The pair whose turn it is not stands still: SIGSTOP for its servers and its client, so
its requests are where they were when it goes on. What a pair does in its own turns is
what counts. Prefill and decode have a core each, as on two machines; where the kernel puts
what stood still is luck otherwise, and lasts.

    stock  ──run──┊  stopped  ┊┊  stopped  ┊──run──  ...   completed while running,
    fixed  stopped┊───run─────┊┊───run─────┊stopped  ...   per second of running
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT, processes
from benchmarks.reclaim.client import Board, Job, read_replies
from benchmarks.reclaim.load import Reply, Shape
from benchmarks.reclaim.pair import ends_of
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.servers.cluster import Cluster
from sglang_scaling_fixes.lab.servers.process import Supervised

FIRST_ROOM = 1_000_001
"""The warm-up has the rooms below."""
_CORES = sorted(os.sched_getaffinity(0))[:2]
_END_S = 120.0


class Half:
    """A warm pair and a client for it, standing still but for their turns.

    `server_cpu` and `client_cpu`: seconds of CPU time in the turns so far.
    """

    def __init__(self, cluster: Cluster, job: Job, board: Board, folder: Path) -> None:
        self.cluster = cluster
        self._job = folder / "job"
        self._board = board
        self._replies = Path(job.replies)
        self._log = folder / "client.log"
        self._client: Supervised | None = None
        self._pids = [p for s in (cluster.fast, cluster.decode) for p in s.process.pids()]
        self._servers = list(self._pids)
        for core, server in zip(_CORES, (cluster.fast, cluster.decode), strict=False):
            processes.pin(server.process.pids(), core)
        job.save(self._job)

    def begin(self) -> None:
        """Start the client; when it is in the middle of its loop, all stand still.

        Only once both pairs are warm: a write that stood still for a minute has failed.
        """
        self.go()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.reclaim.client", str(self._job)]
        self._client = Supervised(command, log=self._log, env=environment)
        while not self._board.completed:
            if not self._client.alive:
                raise LabError(f"the client ended: {self._client.tail()}")
            time.sleep(0.05)
        self._pids += self._client.pids()
        self._servers_before = processes.cpu_seconds(self._servers)
        self._client_before = processes.cpu_seconds(self._client.pids())
        self.stop()

    def turn(self, seconds: float) -> tuple[int, float]:
        """Go on for so long. Requests completed meanwhile, and seconds in truth."""
        before, began = self._board.completed, time.monotonic()
        self.go()
        time.sleep(seconds)
        self.stop()
        return self._board.completed - before, time.monotonic() - began

    def go(self) -> None:
        """Prefill first, the client last: decode looks for prefill's heartbeat."""
        _signal(self._pids, signal.SIGCONT)

    def stop(self) -> None:
        _signal(self._pids[::-1], signal.SIGSTOP)

    def end(self) -> list[Reply]:
        """No more requests; the replies to all that were sent. The pair goes on from here."""
        assert self._client is not None
        self._board.stop()
        self.go()
        deadline = time.monotonic() + _END_S
        while self._client.alive:
            if time.monotonic() > deadline:
                raise LabError(f"requests unanswered for {_END_S:.0f} s after the load")
            time.sleep(0.05)
        if self._client.status != 0:
            raise LabError(f"the client ended: {self._client.tail()}")
        return read_replies(self._replies)

    def close(self) -> None:
        self.go()
        if self._client is not None:
            self._client.end()

    @property
    def server_cpu(self) -> float:
        return processes.cpu_seconds(self._servers) - self._servers_before

    @property
    def client_cpu(self) -> float:
        assert self._client is not None
        return processes.cpu_seconds(self._client.pids()) - self._client_before


@contextlib.contextmanager
def half(cluster: Cluster, shape: Shape, folder: Path) -> Iterator[Half]:
    """`cluster` with a client of its own that has not begun, standing still."""
    job = Job(ends_of(cluster), shape, FIRST_ROOM, str(folder / "board"), str(folder / "replies"))
    with Board.on(Path(job.board)) as board:
        pair = Half(cluster, job, board, folder)
        pair.stop()
        try:
            yield pair
        finally:
            pair.close()


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
