"""A fresh prefill and decode server, stock or armed, for one run of a load."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reclaim.load import End, Ends, Load, Reply, Shape, each_prompt_once
from sglang_scaling_fixes.config import ENV_PREFIX
from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment, install
from sglang_scaling_fixes.lab.runtime import OBSERVE
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.server import Server
from sglang_scaling_fixes.lab.verbs import Transport
from sglang_scaling_fixes.lab.verbs.build import prepare

HALVES = ("stock", "fixed")
FLAGS: dict[str, tuple[str, ...]] = {"stock": (), "fixed": ("--plugin",)}
POOL_TOKENS = 4096
WARM_UPS = 2
UNOBSERVED = {OBSERVE: ""}
"""The lab's observer digests every request's KV: not part of what is measured."""
KEPT = {"SGLANG_TIMEOUT_KEEP_ALIVE": "600"}
"""Seconds: one slow answer must not make the other server hang up on a client."""

_HELD_S = 60.0


class Bench:
    """What all runs of one benchmark share: the release, its checkpoint, a folder for logs, and
    what prefill writes KV with."""

    def __init__(
        self, release: str, folder: Path, progress: Progress, transport: Transport = "tcp"
    ) -> None:
        self.environment: Environment = install(release, progress)
        prepare(transport, progress)
        self.transport = transport
        self.checkpoint = checkpoints.llama(self.environment)
        self.folder = folder
        self.progress = progress

    @contextlib.contextmanager
    def load(self, half: str, shape: Shape) -> Iterator[tuple[Cluster, Load, list[Reply]]]:
        """A warm pair, and the answers of its last warm-up (each prompt once, no aborts)."""
        run_dir = Path(tempfile.mkdtemp(prefix=f"{half}-", dir=self.folder))
        spec = ClusterSpec(
            prefills=1,
            flags=FLAGS[half],
            env={**UNOBSERVED, **KEPT},
            tokens=POOL_TOKENS,
            transport=self.transport,
        )
        with (
            link(0, run_dir, shaped=False) as way,
            Cluster(self.environment, self.checkpoint, way, run_dir, spec) as cluster,
        ):
            load = Load(ends_of(cluster), shape)
            for _ in range(WARM_UPS):
                warm = load.run(each_prompt_once())
            check(warm)
            freeze_gc(cluster.fast, cluster.decode)
            yield cluster, load, warm


def freeze_gc(*servers: Server) -> None:
    """As stock does after its warm-up. Without one (the lab skips it) stock's own attempt may
    come before its port is open, and such a server then looks through its whole heap for ever."""
    for server in servers:
        if (status := server.post("/freeze_gc", {}).status) != 200:
            raise LabError(f"{server.name} answered {status} to /freeze_gc")


def ends_of(cluster: Cluster, prefill: Server | None = None) -> Ends:
    """The decode server with one of the prefills, by default the one beside it."""
    prefill = prefill or cluster.fast

    def end(server: Server) -> End:
        return End(server.name, server.place.address, server.port)

    return Ends(end(prefill), end(cluster.decode), prefill.bootstrap_port)


def check(replies: Sequence[Reply]) -> None:
    """LabError when a request that was not aborted has no answer."""
    if errors := [reply.error for reply in replies if reply.error]:
        raise LabError(f"{len(errors)} requests failed, the first: {errors[0]}")


@contextlib.contextmanager
def folder_for_logs(progress: Progress) -> Iterator[Path]:
    """A temporary folder that stays, and is named, when the benchmark does not end well."""
    folder = Path(tempfile.mkdtemp(prefix="ssf-bench-"))
    try:
        yield folder
    except BaseException:
        progress(f"the servers' logs are in {folder}")
        raise
    shutil.rmtree(folder, ignore_errors=True)


def refuse_settings(env: dict[str, str]) -> None:
    """LabError when the environment would arm or change a half behind the flags."""
    found = sorted(n for n in env if n.startswith(ENV_PREFIX) and "_LAB" not in n)
    if found:
        raise LabError(f"unset {', '.join(found)}: the halves are set by flags alone")


def alternating(runs: int) -> list[str]:
    """stock, fixed, fixed, stock, ...: adjacent pairs, so that slow drift cancels."""
    order: list[str] = []
    for i in range(runs):
        order += HALVES if i % 2 == 0 else HALVES[::-1]
    return order


def decode_report(cluster: Cluster) -> dict[str, Any]:
    """Safe reclaim's own counters on the decode server."""
    state = cluster.decode.get("/server_info").body["internal_states"][0]
    report: dict[str, Any] = state["sglang_scaling_fixes"]["safe_reclaim_decode"]
    return report


def report_when_nothing_is_held(cluster: Cluster) -> dict[str, Any]:
    """The counters once every hold is over; LabError if that does not happen."""
    deadline = time.monotonic() + _HELD_S
    while (report := decode_report(cluster))["held"]:
        if time.monotonic() > deadline:
            raise LabError(f"still held {_HELD_S:.0f} s after the load: {report['held']}")
        time.sleep(0.2)
    return report
