"""The benchmarks run and report what their README says; how fast anything is, is not a test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.reclaim import __main__ as command
from benchmarks.reclaim import figures, pair, report, share
from benchmarks.reclaim.load import Answers, Burst, Reply, Request, Shape, schedule
from sglang_scaling_fixes.reclaim import taps


def test_ledger_reports_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("the gate's figures need stock's allocators")
    output = tmp_path / "result.json"
    arguments = ["--requests", "200", "--repeats", "2"]
    assert command.main(["ledger", *arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text())["ledger"]
    assert {"cpu", "cores", "python"} == set(result["machine"])
    for kind in ("landed", "aborted"):
        parts = dict(result[kind])
        assert parts.pop("both roles") == pytest.approx(sum(parts.values()), abs=0.01)
        assert set(parts) == {"decode", "prefill", "messages"}
        assert min(parts.values()) > 0
    gate = result["gate"]
    assert gate["free_difference"] == pytest.approx(
        gate["gated_free"] - gate["stock_free"], abs=0.002
    )
    assert gate["bookkeeping"] > 0
    printed = capsys.readouterr().out
    assert "landed" in printed and "aborted" in printed


def test_results_of_two_releases_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    report.save(output, "1", "a", {"x": 1})
    report.save(output, "1", "b", {"x": 2})
    assert set(json.loads(output.read_text())) == {"release", "a", "b"}
    with pytest.raises(ValueError, match="not 2"):
        report.save(output, "2", "a", {})


def test_the_same_aborts_in_every_run() -> None:
    shape = Shape(200, 8, 64, 8, 1, abort_share=0.1, abort_within=0.3)
    once = schedule(shape)
    assert once == schedule(shape)
    assert sum(request.abort_after is not None for request in once) == 20


def test_runs_alternate_and_are_compared_in_pairs() -> None:
    assert pair.alternating(3) == ["stock", "fixed", "fixed", "stock", "stock", "fixed"]
    runs = list(zip(pair.alternating(2), [10.0, 9.0, 18.0, 20.0], strict=True))
    result = figures.compare(runs)
    assert result["ratio_per_pair"] == [0.9, 0.9]
    assert result["median"] == {"stock": 15.0, "fixed": 13.5}


def test_percentiles_are_values_that_occurred() -> None:
    assert figures.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert figures.percentile([float(i) for i in range(1, 101)], 0.99) == 99.0
    assert figures.percentile([7.0], 0.99) == 7.0


def test_an_answer_stock_never_gave_is_wrong() -> None:
    answers = Answers()
    answers.learn(burst((1, 2), (1, 3)))  # stock in two ways: both are right
    answers.given("stock", burst((1, 2)))
    answers.given("fixed", burst((1, 3), (9, 9)))
    verdict = answers.verdict()
    assert verdict["wrong"] == {"stock": 0, "fixed": 1}
    assert verdict["prompts_stock_answers_in_two_ways"] == 1


def burst(*answers: tuple[int, ...]) -> Burst:
    replies = [Reply(Request(0).prompt, ids, False, "", 0.1) for ids in answers]
    return Burst(1.0, replies, {"client": 0.0}, 0.0)


def test_settings_in_the_environment_are_refused() -> None:
    with pytest.raises(Exception, match="SGLANG_SCALING_FIXES_PLUGIN"):
        pair.refuse_settings({"SGLANG_SCALING_FIXES_PLUGIN": "default"})
    pair.refuse_settings({"SGLANG_SCALING_FIXES_LAB_HOME": "anywhere"})


def test_a_sample_belongs_to_the_innermost_of_plugin_and_sglang() -> None:
    loop = "loop (/env/site-packages/sglang/srt/managers/scheduler.py:1)"
    tick = f"tick ({share._OURS}reclaim/decode.py:1)"
    stock = "poll (/env/site-packages/sglang/srt/disaggregation/mooncake/conn.py:1)"
    send = "send_multipart (/env/site-packages/zmq/sugar/socket.py:1)"
    stand_in = f"write ({share._OURS}lab/standins/dsa.py:1)"
    stacks = [
        f"{loop};{tick} 3",
        f"{loop};{tick};{send} 2",
        f"{loop};{tick};{stock} 10",
        f"{loop};{stock};{send} 10",
        f"{loop};{stand_in} 10",
        f"{send} 1",
    ]
    assert share.count(stacks) == {"ours": 5, "sglang": 30, "other": 1}


def test_a_line_that_hands_over_to_stock_is_stocks() -> None:
    path = Path(taps.__file__)
    lines = path.read_text().splitlines()
    over = next(n for n, line in enumerate(lines, 1) if "return self._stock.send_mul" in line)
    own = next(n for n, line in enumerate(lines, 1) if "self._ledger.put(chunk)" in line)
    stacks = [f"send ({path}:{over});send_multipart (/zmq/socket.py:1) 7", f"put ({path}:{own}) 2"]
    assert share.count(stacks) == {"ours": 2, "sglang": 7}
