"""What several tests ask of lab servers."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.cluster import Cluster
from sglang_scaling_fixes.lab.servers.serve import Options, Served, serving


def resting(
    options: Options, environment: Environment, run_dir: Path
) -> contextlib.AbstractContextManager[Served]:
    """As `serving`, but the servers take no CPU time while no request is there."""
    return serving(replace(options, sleep_on_idle=True), environment, run_dir)


def report(cluster: Cluster) -> dict[str, Any]:
    """Safe reclaim of decode, as TP rank 0 says: stock asks no other."""
    state = cluster.decode.get("/server_info").body["internal_states"][0]
    result: dict[str, Any] = state["sglang_scaling_fixes"]["safe_reclaim_decode"]
    return result


def prompt(length: int) -> list[int]:
    """The prompt of this length: always the same."""
    draw = random.Random(length)
    return [draw.randrange(10, 900) for _ in range(length)]


def wait_for(holds: Callable[[], bool], otherwise: str, timeout_s: float = 60.0) -> None:
    """Fail with `otherwise` if it does not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
