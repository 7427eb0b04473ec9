"""An ailing prefill is refused, the other one served; a fence. Real servers, real Mooncake."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.server import Server
from sglang_scaling_fixes.reclaim.retry_after import AILING, REASON_HEADER
from sglang_scaling_fixes.reclaim.rules.quarantine import RETRY_AFTER_S
from tests.verbs.needs import LONG_OVER_RDMA

from .servers import prompt, report, wait_for

SPEC = ClusterSpec(
    flags=("--plugin", "--safe-reclaim-audit", "--enable-metrics"), sleep_on_idle=True
)


@pytest.fixture(params=LONG_OVER_RDMA)
def cluster(
    request: pytest.FixtureRequest, new: Environment, checkpoint: Model, tmp_path: Path
) -> Iterator[Cluster]:
    spec = replace(SPEC, transport=request.param)
    with (
        link(0, tmp_path, shaped=False) as way,
        Cluster(new, checkpoint, way, tmp_path, spec) as cluster,
    ):
        yield cluster


def refused(cluster: Cluster, prefill: Server) -> tuple[int, str, str, str]:
    """Status, Retry-After, reason and text of decode's answer to one more request."""
    payload = {
        "input_ids": prompt(20),
        "sampling_params": {"max_new_tokens": 4},
        "bootstrap_host": prefill.place.address,
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": 99,
    }
    server = cluster.decode
    request = urllib.request.Request(
        f"http://{server.place.address}:{server.port}/generate",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = caught.value
    said = error.headers.get("Retry-After", ""), error.headers.get(REASON_HEADER.decode(), "")
    return error.code, *said, error.read().decode()


def test_a_writer_that_does_not_answer_is_waited_for_and_one_that_is_gone_is_fenced(
    cluster: Cluster,
) -> None:
    reference = cluster.send(cluster.fast, prompt(600), "before", max_new_tokens=8).wait()
    assert reference.ids is not None
    # Decode meets the other prefill while that can still be met.
    assert cluster.send(cluster.slow, prompt(20), "met", max_new_tokens=2).wait().ids is not None
    held_tokens = "sglang_scaling_fixes_reclaim_held_tokens"
    pids = cluster.slow.process.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    lost = cluster.send(cluster.slow, prompt(700), "lost", max_new_tokens=8)
    wait_for(lambda: report(cluster)["exposures"] == 3, "destinations were never sent")
    cluster.abort(lost.rid)
    wait_for(lambda: report(cluster)["ailing"], "the hold was never too old")

    # Alive and silent: no proof, and no reason to fence. Only its own requests are refused.
    *said, text = refused(cluster, cluster.slow)
    assert said == [503, str(RETRY_AFTER_S), "prefill-ailing"]
    assert AILING in text and f":{cluster.slow.bootstrap_port}" in text
    beside = cluster.send(cluster.fast, prompt(600), "beside", max_new_tokens=8).wait()
    assert beside.ids == reference.ids
    assert cluster.decode.get("/health").status == 200
    time.sleep(3)
    held = report(cluster)
    assert held["held_tokens"] == 700 and held["fences"] == 0
    assert "no answer yet" in held["held"][0]["why"]
    metrics = cluster.decode.get("/metrics").body
    assert f"{held_tokens}{{" in metrics and 'reason="no answer yet"' in metrics

    # Gone: bytes of it may still be in some buffer, so fence, then give back.
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: report(cluster)["held_tokens"] == 0, "the slots never came back")
    after = report(cluster)
    assert after["fences"] == 1 and after["frees"] == {"P4": 1} and not after["ailing"]
    again = cluster.send(cluster.fast, prompt(600), "after", max_new_tokens=8).wait()
    assert again.ids == reference.ids
    assert report(cluster)["landed"] == 4
