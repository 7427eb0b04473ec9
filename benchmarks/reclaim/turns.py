"""Two warm pairs of servers that take turns of a fraction of a second on one machine.

The pair whose turn it is not stands still: SIGSTOP for its servers and its client, so
its requests are where they were when it goes on. What a pair does in its own turns is
what counts.

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

from benchmarks.reclaim import processes
from benchmarks.reclaim.client import Board, Job, read_replies
from benchmarks.reclaim.load import Reply, Shape
from benchmarks.reclaim.pair import ends_of
from sglang_scaling_fixes.lab.cluster import Cluster
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.process import Guarded

FIRST_ROOM = 1_000_001
"""The warm-up has the rooms below."""
_ROOT = Path(__file__).parents[2]
_END_S = 120.0


class Half:
    """A warm pair with its client, still but for its turns.

    `server_cpu` and `client_cpu`: seconds of CPU time in the turns so far.
    """

    def __init__(self, cluster: Cluster, client: Guarded, board: Board, replies: Path) -> None:
        self.cluster = cluster
        self._client = client
        self._board = board
        self._replies = replies
        self._servers = [p for s in (cluster.fast, cluster.decode) for p in s.process.pids()]
        self._pids = [*self._servers, *client.pids()]
        self._servers_before = processes.cpu_seconds(self._servers)

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
        self._board.stop()
        self.go()
        deadline = time.monotonic() + _END_S
        while self._client.alive:
            if time.monotonic() > deadline:
                raise LabError(f"requests unanswered for {_END_S:.0f} s after the load")
            time.sleep(0.05)
        if self._client.status != 0:
            raise LabError(f"the client ended with status {self._client.status}")
        return read_replies(self._replies)

    @property
    def server_cpu(self) -> float:
        return processes.cpu_seconds(self._servers) - self._servers_before

    @property
    def client_cpu(self) -> float:
        return processes.cpu_seconds(self._client.pids())


@contextlib.contextmanager
def half(cluster: Cluster, shape: Shape, folder: Path) -> Iterator[Half]:
    """`cluster` with a client of its own that is in the middle of its loop, standing still."""
    job = Job(ends_of(cluster), shape, FIRST_ROOM, str(folder / "board"), str(folder / "replies"))
    job.save(folder / "job")
    with Board.on(Path(job.board)) as board:
        command = [sys.executable, "-m", "benchmarks.reclaim.client", str(folder / "job")]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        client = Guarded(command, log=folder / "client.log", env=environment)
        try:
            while not board.completed:
                if not client.alive:
                    raise LabError(f"the client ended: {client.tail()}")
                time.sleep(0.05)
            pair = Half(cluster, client, board, Path(job.replies))
            pair.stop()
            try:
                yield pair
            finally:
                pair.go()
        finally:
            client.end()


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
