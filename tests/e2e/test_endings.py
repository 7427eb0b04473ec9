"""A request that ends on prefill ends on decode as well, at once. Real servers.

The stock half is the negative control: decode hears nothing, and waits for its own time-out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.pending import Outcome
from sglang_scaling_fixes.reclaim.retry_after import ENDED

from .servers import prompt, report, wait_for

TIMEOUT_S = 15
"""Stock's 300 s, made shorter."""
LINK_MBIT = 6.0
LONG, TOO_LONG = 600, 1000
SPEC = ClusterSpec(
    prefill_flags=("--chunked-prefill-size", "128"),
    slow_flags=("--max-total-tokens", "800"),
    env={"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(TIMEOUT_S)},
    sleep_on_idle=True,
)


@dataclass
class Seen:
    """How the requests ended on decode, and what safe reclaim says in the end (None: stock)."""

    aborted: Outcome
    rejected: Outcome
    after: Outcome
    report: dict[str, Any] | None


def play(environment: Environment, model: Model, run_dir: Path, *, armed: bool) -> Seen:
    flags = ("--plugin", "--safe-reclaim-audit") if armed else ()
    spec = ClusterSpec(**{**vars(SPEC), "flags": flags})
    with link(LINK_MBIT, run_dir) as way, Cluster(environment, model, way, run_dir, spec) as pair:
        if way.mode != "shaped":
            pytest.skip("no request can be caught on its way without a slow link")
        assert pair.send(pair.slow, prompt(20), "met", max_new_tokens=2).wait().ids is not None
        aborted = pair.send(pair.slow, prompt(LONG), "aborted", max_new_tokens=8)
        time.sleep(2.0)  # a chunk of it is on the wire
        while not aborted.done("prefill"):
            pair.slow.post("/abort_request", {"rid": "aborted"}, timeout_s=30.0)
            time.sleep(0.2)
        rejected = pair.send(pair.slow, prompt(TOO_LONG), "rejected", max_new_tokens=8)
        outcomes = aborted.wait(), rejected.wait()
        if armed:
            wait_for(lambda: report(pair)["held_tokens"] == 0, "the slots never came back")
        after = pair.send(pair.fast, prompt(1200), "after", max_new_tokens=8).wait()
        return Seen(*outcomes, after, report(pair) if armed else None)


@pytest.fixture(scope="module")
def armed(new: Environment, checkpoint: Model, tmp_path_factory: Any) -> Seen:
    return play(new, checkpoint, tmp_path_factory.mktemp("armed"), armed=True)


@pytest.fixture(scope="module")
def stock(new: Environment, checkpoint: Model, tmp_path_factory: Any) -> Seen:
    return play(new, checkpoint, tmp_path_factory.mktemp("stock"), armed=False)


def test_on_stock_decode_waits_for_its_time_out(stock: Seen) -> None:
    for outcome in (stock.aborted, stock.rejected):
        assert outcome.prefill is not None and outcome.prefill.status != 0
        assert outcome.decode.status == 500
        assert f"timed out after {TIMEOUT_S}" in (outcome.refusal or "")


def test_armed_it_ends_when_prefill_does(armed: Seen) -> None:
    for outcome in (armed.aborted, armed.rejected):
        assert outcome.decode.status == 503
        assert (outcome.refusal or "").startswith(ENDED)
    assert "maximum" in (armed.rejected.refusal or "") or "length" in (armed.rejected.refusal or "")


def test_its_slots_are_back_by_prefills_word(armed: Seen) -> None:
    assert armed.report is not None and armed.after.ids is not None
    assert (armed.report["endings"], armed.report["gave_up"], armed.report["returned"]) == (2, 2, 2)
    assert armed.report["frees"] == {"P2": 2}
    assert armed.report["fences"] == 0
