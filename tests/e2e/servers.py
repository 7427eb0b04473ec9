"""What several tests ask of lab servers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.lab.cluster import Cluster


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
