"""A plain prefill/decode pair with the plugin: the same answers, the states where they belong."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link

PROBE_ROOM = 7_000_000_007
AUDIT = ("--plugin", "--safe-reclaim-audit")
SHAPE = ("--chunked-prefill-size", "128", "--page-size", "16")
"""Several chunks per request, and the paged allocator."""
REQUESTS = 6


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(10, 900) for _ in range(n)] for n in (3, 40, 200, 199, 40, 600)]


def run_pair(
    environment: Environment, checkpoint: Model, run_dir: Path, flags: tuple[str, ...]
) -> dict[str, Any]:
    """All prompts at once through one pair, and what the servers say of themselves."""
    spec = ClusterSpec(prefills=1, flags=(*SHAPE, *flags), sleep_on_idle=True)
    with (
        link(0, run_dir, shaped=False) as way,
        Cluster(environment, checkpoint, way, run_dir, spec) as cluster,
    ):
        pending = [
            cluster.send(cluster.fast, prompt, f"r{i}", max_new_tokens=24)
            for i, prompt in enumerate(prompts())
        ]
        outcomes = [one.wait() for one in pending]
        seen: dict[str, Any] = {
            "ids": [outcome.ids for outcome in outcomes],
            "decode": cluster.decode.get("/server_info").body,
            "prefill": cluster.fast.get("/server_info").body,
            "logs": {
                server.name: server.process.log.read_text()
                for server in (cluster.decode, cluster.fast)
            },
        }
        if flags:
            seen["leftover"] = crash_and_count(cluster)
    return seen


def crash_and_count(cluster: Cluster) -> list[int]:
    """SIGKILL the decode server's supervisor, the lab's own process: what of its tree is left?"""
    supervised = cluster.decode.process
    tree = [supervised.supervisor_pid, *supervised.pids()]
    assert len(tree) > 3
    os.kill(supervised.supervisor_pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (left := [pid for pid in tree if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def stock(new: Environment, checkpoint: Model, tmp_path_factory: Any) -> dict[str, Any]:
    return run_pair(new, checkpoint, tmp_path_factory.mktemp("stock"), ())


@pytest.fixture(scope="module")
def armed(new: Environment, checkpoint: Model, tmp_path_factory: Any) -> dict[str, Any]:
    return run_pair(new, checkpoint, tmp_path_factory.mktemp("armed"), AUDIT)


def test_outputs_equal_stocks(stock: dict[str, Any], armed: dict[str, Any]) -> None:
    assert all(ids is not None for ids in stock["ids"])
    assert armed["ids"] == stock["ids"]


def test_stock_is_untouched_and_says_so_once(stock: dict[str, Any]) -> None:
    for role in ("decode", "prefill"):
        assert "sglang_scaling_fixes" not in stock[role]
        assert "sglang_scaling_fixes" not in stock[role]["internal_states"][0]
    for log in stock["logs"].values():
        assert log.count("sglang-scaling-fixes is installed and not armed") == 1


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_states_are_in_server_info_and_the_log(armed: dict[str, Any], role: str) -> None:
    states = {fix["name"]: fix["state"] for fix in armed[role]["sglang_scaling_fixes"]}
    assert states["safe-reclaim"] == "armed"
    name = "decode" if role == "decode" else "prefill-fast"
    assert "sglang-scaling-fixes: safe-reclaim armed" in armed["logs"][name]
    assert f"room {PROBE_ROOM // 100}" not in armed["logs"][name], "the probe's rooms are nobody's"


def test_every_exposure_was_accounted_for(armed: dict[str, Any]) -> None:
    decode = armed["decode"]["internal_states"][0]["sglang_scaling_fixes"]["safe_reclaim_decode"]
    prefill = armed["prefill"]["internal_states"][0]["sglang_scaling_fixes"]["safe_reclaim_prefill"]
    assert (decode["exposures"], decode["landed"], decode["gave_up"]) == (REQUESTS, REQUESTS, 0)
    assert (decode["held_tokens"], decode["peers"]) == (0, 1)
    bad = ("chunks_dropped", "failed_writes", "short_sends")
    assert [prefill["bound"], *(prefill[name] for name in bad)] == [REQUESTS, 0, 0, 0]


def test_a_killed_lab_leaves_nothing_running(armed: dict[str, Any]) -> None:
    assert armed["leftover"] == []
