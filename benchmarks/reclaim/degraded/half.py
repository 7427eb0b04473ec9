"""One half's servers: in trouble, well again, and standing still while it is the other's turn."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.reclaim.degraded.cases import FAILING, SLOW_MBIT, Act
from benchmarks.reclaim.degraded.counts import AILING, HEALTHY
from benchmarks.reclaim.degraded.exchange import Router
from benchmarks.reclaim.degraded.known import Ids, Known
from benchmarks.reclaim.degraded.load import payload
from benchmarks.reclaim.pair import UNOBSERVED, Bench, decode_report, ends_of, freeze_gc
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.runtime import FAIL
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import Link, link
from sglang_scaling_fixes.lab.servers.server import Server

ANSWER_S = 10.0
"""A prefill that is well answers one request within this."""
WELL_S = 25.0
"""What is left of a trouble has ended by then, or a server is started anew."""
_HUNG_UP_S = 5.0
"""Stock looks every 4 s whether its clients are still there."""

T = TypeVar("T")


class Half:
    """`name`: as in `pair.HALVES`. Room numbers are its own."""

    def __init__(self, name: str, cluster: Cluster, way: Link, failing: Path) -> None:
        self.name = name
        self.rooms = itertools.count(1_000_001)
        self.ends = {
            HEALTHY: ends_of(cluster, cluster.fast),
            AILING: ends_of(cluster, cluster.slow),
        }
        self._cluster = cluster
        self._way = way
        self._failing = failing
        self._killed = False
        self._servers = (cluster.fast, cluster.slow, cluster.decode)

    # -- turns ---------------------------------------------------------------------------

    def go(self) -> None:
        """Prefills first: decode looks for their heartbeats."""
        for server in self._servers:
            server.signal(signal.SIGCONT)

    def stand_still(self) -> None:
        for server in reversed(self._servers):
            server.signal(signal.SIGSTOP)

    # -- requests ------------------------------------------------------------------------

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine in a thread of its own, where the servers are."""

        def run() -> T:
            with self._cluster.decode.client.entered():
                return asyncio.run(work())

        executor = ThreadPoolExecutor(1)
        future = executor.submit(run)
        executor.shutdown(wait=False)
        return future

    def ask(self, prefill: str, prompts: Sequence[tuple[int, ...]], at_once: int) -> list[Ids]:
        """The answers to these prompts through one prefill; LabError where there is none."""

        async def work() -> list[Ids]:
            places = asyncio.Semaphore(at_once)
            async with Router.opened(6 * ANSWER_S) as router:
                return await asyncio.gather(*(one(router, places, prompt) for prompt in prompts))

        async def one(router: Router, places: asyncio.Semaphore, prompt: tuple[int, ...]) -> Ids:
            async with places:
                return await self._one(router, prefill, prompt)

        return self.start(work).result()

    async def _one(self, router: Router, prefill: str, prompt: tuple[int, ...]) -> Ids:
        ends = self.ends[prefill]
        answer = await router.ask(ends, payload(ends, prompt, next(self.rooms)))
        if answer.status != 200 or not (ids := answer.body.get("output_ids")):
            raise LabError(f"{self.name}: {prefill} prefill, {answer.status}: {answer.body!s:.200}")
        return tuple(ids)

    # -- trouble -------------------------------------------------------------------------

    def act(self, act: Act) -> None:
        """One act of a case's script."""
        slow = self._cluster.slow
        if act is Act.SLOW_LINK:
            self._way.reshape(SLOW_MBIT)
        elif act is Act.STOP:
            slow.signal(signal.SIGSTOP)
        elif act is Act.GO_ON:
            slow.signal(signal.SIGCONT)
        elif act is Act.KILL:
            slow.signal(signal.SIGKILL)
            slow.restart()
            self._killed = True
        elif act is Act.FAIL_WRITES:
            self._failing.write_text(str(FAILING))

    def calm(self) -> None:
        """End all trouble, and wait until it is noticed that the clients have gone."""
        slow = self._cluster.slow
        self._way.reshape(None)
        self._failing.unlink(missing_ok=True)
        slow.signal(signal.SIGCONT)
        if self._killed:
            self._killed = False
            slow.wait_ready()
            freeze_gc(slow)
        time.sleep(_HUNG_UP_S)

    def mend(self, known: Known) -> list[str]:
        """What had to be started anew until both prefills answered and nothing was held."""
        started: list[str] = []
        for what, servers in (
            ("", ()),
            ("the ailing prefill", (self._cluster.slow,)),
            ("all servers", self._servers),
        ):
            if servers:
                started.append(what)
                start_anew(servers)
            if self._well(known):
                return started
        raise LabError(f"{self.name}: fresh servers do not answer; logs in {self._failing.parent}")

    def _well(self, known: Known) -> bool:
        deadline = time.monotonic() + WELL_S
        while self._cluster.decode.process.alive:
            if self._answers(known) and not self._holds():
                return True
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return False

    def _answers(self, known: Known) -> bool:
        """Whether both prefills answer rightly, one after the other."""

        async def work() -> bool:
            async with Router.opened(ANSWER_S) as router:
                for prefill in self.ends:
                    try:
                        if await self._one(router, prefill, known.prompt) != known.ids:
                            return False
                    except LabError:
                        return False
            return True

        return self.start(work).result()

    def _holds(self) -> bool:
        if self.name == "stock":
            return False
        try:
            return bool(decode_report(self._cluster)["held"])
        except (KeyError, TypeError):  # it does not answer, or not with a report
            return True


def start_anew(servers: Sequence[Server]) -> None:
    for server in servers:
        server.restart()
    for server in servers:
        server.wait_ready()
    freeze_gc(*servers)


@contextlib.contextmanager
def half(bench: Bench, name: str, flags: tuple[str, ...], tokens: int) -> Iterator[Half]:
    """Fresh servers, both prefills on fast links of their own."""
    run_dir = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=bench.folder))
    failing = run_dir / "failing"
    spec = ClusterSpec(
        flags=flags,
        env=UNOBSERVED,
        slow_env={FAIL: str(failing)},
        tokens=tokens,
        sleep_on_idle=True,
    )
    with link(SLOW_MBIT, run_dir) as way:
        if way.mode != "shaped":
            raise LabError(f"a slow link is needed, and there is none: {way.reason}")
        way.reshape(None)
        with Cluster(bench.environment, bench.checkpoint, way, run_dir, spec) as cluster:
            bench.progress(f"{name}: ready after {cluster.ready_s:.0f} s")
            freeze_gc(cluster.fast, cluster.slow, cluster.decode)
            yield Half(name, cluster, way, failing)
