"""One room for two requests, and an operator's requests while slots are held. Real servers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.reclaim.decode.maintenance import NOT_RELEASED
from sglang_scaling_fixes.reclaim.retry_after import TAKEN

from .servers import prompt, report, wait_for

SPEC = ClusterSpec(
    flags=("--plugin", "--safe-reclaim-audit", "--safe-reclaim-max-held", "1"), sleep_on_idle=True
)


@pytest.mark.parametrize("release", [pytest.param("old", marks=pytest.mark.long), "new"])
def test_a_decode_that_holds_slots_lives_through_what_stock_asserts_to_be_idle_for(
    release: str, checkpoint: Model, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    environment = request.getfixturevalue(release)
    with (
        link(0, tmp_path, shaped=False) as way,
        Cluster(environment, checkpoint, way, tmp_path, SPEC) as cluster,
    ):
        live_through(cluster)


def live_through(cluster: Cluster) -> None:
    fast = cluster.send(cluster.fast, prompt(600), "fast", max_new_tokens=8).wait()
    slow = cluster.send(cluster.slow, prompt(1000), "slow", max_new_tokens=8).wait()
    assert fast.ids is not None and slow.ids is not None
    pids = cluster.slow.process.pids()

    def signalled(number: signal.Signals) -> None:
        for pid in pids:
            os.kill(pid, number)

    # Two requests of one room: the second is told, and the first does not notice.
    signalled(signal.SIGSTOP)
    first = cluster.send(cluster.slow, prompt(1000), "first", max_new_tokens=8, room=777)
    wait_for(lambda: report(cluster)["exposures"] == 3, "destinations were never sent")
    second = cluster.send(cluster.fast, prompt(600), "second", max_new_tokens=8, room=777)
    refused = second.wait(prefill=False)
    assert refused.decode.status == 503 and TAKEN in str(refused.refusal)
    signalled(signal.SIGCONT)
    assert first.wait().ids == slow.ids

    # A hold that does not end: nothing is released, and the scheduler lives.
    signalled(signal.SIGSTOP)
    lost = cluster.send(cluster.slow, prompt(1000), "lost", max_new_tokens=8)
    wait_for(lambda: report(cluster)["exposures"] == 4, "destinations were never sent")
    cluster.abort(lost.rid)
    wait_for(lambda: report(cluster)["held_tokens"] == 1000, "nothing was held")
    release, resume = "/release_memory_occupation", "/resume_memory_occupation"
    answer = cluster.decode.post(release, {}, timeout_s=60.0)
    assert answer.status in (400, 503) and NOT_RELEASED in str(answer.body)
    assert f"room {lost.room}" in str(answer.body)
    assert cluster.decode.post(resume, {}, timeout_s=60.0).status == 200
    flushed = cluster.decode.post("/flush_cache", {}, timeout_s=60.0)
    assert flushed.status == 400 and f"room {lost.room}" in str(flushed.body)
    assert report(cluster)["held_tokens"] == 1000

    # Its proof comes while the operator waits.
    signalled(signal.SIGCONT)
    assert cluster.decode.post(release, {}, timeout_s=60.0).status == 200
    assert report(cluster)["held_tokens"] == 0
    assert cluster.decode.post(resume, {}, timeout_s=60.0).status == 200
    after = cluster.send(cluster.fast, prompt(600), "after", max_new_tokens=8).wait()
    assert after.ids == fast.ids
