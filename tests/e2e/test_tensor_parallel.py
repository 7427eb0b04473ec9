"""Two tensor-parallel ranks on each side: held slots come back on both ranks or on none.

The control runs last, on the same servers: with the agreement taken out, one rank gives
back what the other still holds.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.pending import Pending
from sglang_scaling_fixes.lab.servers.server import Server
from tests.verbs.needs import LONG_OVER_RDMA

from .servers import prompt, report, wait_for

RANKS = 2
FLAGS = (
    "--tp-size", str(RANKS), "--plugin", "--safe-reclaim-audit",
    "--safe-reclaim-max-held", "1",  # no refusals: holds are long here on purpose
)  # fmt: skip
CPU_RANKS = {
    # One core each, and no NCCL: without a GPU it loads and then fails.
    "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(i % (os.cpu_count() or 1)) for i in range(RANKS)),
    "SGLANG_NCCL_SO_PATH": "/nonexistent",
}
SPEC = ClusterSpec(prefills=1, flags=FLAGS, env=CPU_RANKS, sleep_on_idle=True)
ABORTED = 1000  # tokens

WITHOUT_AGREEMENT = """
import os
from sglang_scaling_fixes import import_hooks

def patch(ranks):
    agree = ranks.TpGroup.all_true
    ranks.TpGroup.all_true = lambda group, proven: (
        proven if os.path.exists({switch!r}) else agree(group, proven)
    )

import_hooks.after_import("sglang_scaling_fixes.ranks", patch)
"""


@pytest.fixture(scope="module")
def switch(tmp_path_factory: Any) -> Path:
    """While this file exists, the ranks free without asking each other."""
    path: Path = tmp_path_factory.mktemp("switch") / "no-agreement"
    return path


@pytest.fixture(scope="module", params=LONG_OVER_RDMA)
def cluster(
    request: pytest.FixtureRequest,
    old: Environment,
    checkpoint: Model,
    switch: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """The release whose own code holds nothing, so that every hold seen is ours."""
    run_dir, hook = tmp_path_factory.mktemp("tp"), tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(WITHOUT_AGREEMENT.format(switch=str(switch)))
    with pytest.MonkeyPatch.context() as patch, link(0, run_dir, shaped=False) as way:
        patch.setenv("PYTHONPATH", str(hook), prepend=os.pathsep)
        spec = replace(SPEC, transport=request.param)
        with Cluster(old, checkpoint, way, run_dir, spec) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> list[list[int] | None]:
    """What each prompt is answered with when it comes alone."""
    return [send(cluster, n, f"alone-{n}").wait().ids for n in range(len(LENGTHS))]


LENGTHS = (3, 40, 120, 199, 300)


def send(cluster: Cluster, number: int, rid: str) -> Pending:
    return cluster.send(cluster.fast, prompt(LENGTHS[number]), rid, max_new_tokens=12)


def test_an_abort_is_held_on_both_ranks_until_both_have_proof(cluster: Cluster) -> None:
    with aborted_while_one_prefill_rank_stands(cluster) as room:
        wait_for(lambda: "waiting for the other TP ranks" in why(cluster), "rank 0 got no proof")
        assert report(cluster)["held_tokens"] == ABORTED
        assert came_back(cluster, room) == {}
    wait_for(lambda: report(cluster)["held_tokens"] == 0, "proof did not give the slots back")
    wait_for(lambda: len(came_back(cluster, room)) == RANKS, "only one rank gave the slots back")
    assert came_back(cluster, room) == dict.fromkeys(range(RANKS), (ABORTED, "P2"))


def test_requests_and_aborts_leave_the_ranks_together(
    cluster: Cluster, reference: list[list[int] | None]
) -> None:
    assert all(ids is not None for ids in reference)
    draw = random.Random(3)
    sent: list[tuple[int, Pending]] = []
    for i in range(30):
        number = draw.randrange(len(LENGTHS))
        sent.append((number, send(cluster, number, f"mixed-{i}")))
        time.sleep(draw.random() / 5)
        if draw.random() < 0.4:
            cluster.abort(draw.choice(sent[-4:])[1].rid)
    answered = 0
    for number, pending in sent:
        outcome = pending.wait(prefill=False)
        assert outcome.aborted or outcome.ids == reference[number], outcome.decode.body
        answered += outcome.ids is not None
    assert 0 < answered < len(sent)
    wait_for(lambda: not report(cluster)["held"], "something stayed held")
    for number, ids in enumerate(reference):
        assert send(cluster, number, f"after-{number}").wait().ids == ids
    seen = report(cluster)
    assert seen["exposures"] == seen["landed"] + seen["gave_up"]
    assert seen["returned"] == seen["gave_up"] > 0


def test_without_agreement_one_rank_frees_alone(cluster: Cluster, switch: Path) -> None:
    """The control: the same as the first test, the ranks no longer asking each other."""
    switch.touch()
    with aborted_while_one_prefill_rank_stands(cluster) as room:
        wait_for(lambda: 0 in came_back(cluster, room), "rank 0 waited for rank 1")
        assert 1 not in came_back(cluster, room)


@contextlib.contextmanager
def aborted_while_one_prefill_rank_stands(cluster: Cluster) -> Iterator[int]:
    """A request is aborted; prefill's rank 0 proves it at once, its rank 1 after the block."""
    standing = scheduler(cluster.fast, rank=1)
    before = report(cluster)
    os.kill(standing, signal.SIGSTOP)
    try:
        rid = f"aborted-{before['exposures']}"
        cluster.send(cluster.fast, prompt(ABORTED), rid, max_new_tokens=8)
        wait_for(lambda: rises(cluster, "exposures", before), "destinations were never sent")
        cluster.abort(rid)
        wait_for(lambda: rises(cluster, "gave_up", before), "the abort did not arrive")
        yield cluster._room
    finally:
        os.kill(standing, signal.SIGCONT)


def scheduler(server: Server, rank: int) -> int:
    """Process id of one rank of a server."""
    for pid in server.process.pids():
        title = Path(f"/proc/{pid}/cmdline").read_text()
        if title.startswith("sglang::scheduler") and f"TP{rank}" in title:
            return pid
    raise AssertionError(f"{server.name} has no scheduler of TP rank {rank}")


def rises(cluster: Cluster, counter: str, before: dict[str, Any]) -> bool:
    return bool(report(cluster)[counter] > before[counter])


def why(cluster: Cluster) -> str:
    return " ".join(hold["why"] for hold in report(cluster)["held"])


def came_back(cluster: Cluster, room: int) -> dict[int, tuple[int, str]]:
    """Rank -> tokens given back and the proof, for one room, as the log says."""
    found = re.findall(
        rf"TP(\d)\] safe-reclaim: room {room}: (\d+) token slots back .*proof (\S+)",
        cluster.decode.process.log.read_text(),
    )
    return {int(rank): (int(tokens), proof) for rank, tokens, proof in found}
