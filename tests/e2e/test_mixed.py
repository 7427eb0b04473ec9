"""The plugin on one role only: served, nothing freed without proof, and it says so."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.server import Server

from .servers import prompt, report, wait_for

SPEC = ClusterSpec(
    prefills=1, decode_flags=("--plugin", "--safe-reclaim-audit"), sleep_on_idle=True
)
"""Only the decode server is armed."""


@pytest.fixture(scope="module")
def cluster(old: Environment, checkpoint: Model, tmp_path_factory: Any) -> Iterator[Cluster]:
    run_dir = tmp_path_factory.mktemp("mixed")
    with (
        link(0, run_dir, shaped=False) as way,
        Cluster(old, checkpoint, way, run_dir, SPEC) as cluster,
    ):
        yield cluster


def test_a_stock_prefill_serves_an_armed_decode(cluster: Cluster) -> None:
    outcome = cluster.send(cluster.fast, prompt(300), "plain", max_new_tokens=8).wait()
    assert outcome.ids is not None and len(outcome.ids) == 8
    assert report(cluster)["peers"] == 0


def test_an_abort_is_held_until_stock_reports_success(cluster: Cluster) -> None:
    """Stock 0.5.12 prefill never learns of the abort; its success message is the only proof."""
    with stopped(cluster.fast):
        pending = cluster.send(cluster.fast, prompt(1000), "late", max_new_tokens=8)
        wait_for(lambda: report(cluster)["exposures"] >= 2, "destinations were never sent")
        cluster.abort("late")
        wait_for(lambda: report(cluster)["held_tokens"] == 1000, "the abort was not held")
        time.sleep(1.0)
        held = report(cluster)
        assert held["held_tokens"] == 1000
        assert "runs without safe-reclaim" in held["held"][0]["why"]
    pending.wait()
    wait_for(lambda: report(cluster)["held_tokens"] == 0, "success did not give the slots back")
    assert report(cluster)["frees"]["P3"] == 1
    outcome = cluster.send(cluster.fast, prompt(1200), "after", max_new_tokens=8).wait()
    assert outcome.ids is not None


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    pids = server.process.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
