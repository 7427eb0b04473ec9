"""The benchmarks run and report what their README says; how fast anything is, is not a test."""

from __future__ import annotations

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.common import figures, reports
from benchmarks.reclaim import __main__ as command
from benchmarks.reclaim import client, memory, pair, share
from benchmarks.reclaim.client import Board, Job
from benchmarks.reclaim.load import Answers, End, Ends, Reply, Request, Shape, schedule
from sglang_scaling_fixes.reclaim.prefill import interposers


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


def test_storm_reports_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("the frees are those of stock's allocators")
    output = tmp_path / "result.json"
    arguments = ["--transfers", "4", "80", "--repeats", "1", "--output", str(output)]
    assert command.main(["storm", *arguments]) == 0
    result = json.loads(output.read_text())["storm"]
    found = [(s["transfers"], s["writers"], s["aborts"]) for s in result["storms"]]
    assert found == [(4, 1, 4), (4, 8, 32), (80, 1, 64), (80, 8, 8 * 64)]
    assert min(s["storm_ms"] for s in result["storms"]) > 0
    assert "log lines per minute" in capsys.readouterr().out


def test_results_of_two_releases_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    reports.save(output, "1", "a", {"x": 1})
    reports.save(output, "1", "b", {"x": 2})
    assert set(json.loads(output.read_text())) == {"release", "a", "b"}
    with pytest.raises(ValueError, match="not 2"):
        reports.save(output, "2", "a", {})


def test_the_same_aborts_in_every_run() -> None:
    shape = Shape(200, 8, 64, 8, 1, abort_share=0.1, abort_within=0.3)
    once = schedule(shape)
    assert once == schedule(shape)
    assert sum(request.abort_after is not None for request in once) == 20


def test_turns_alternate() -> None:
    assert pair.alternating(3) == ["stock", "fixed", "fixed", "stock", "stock", "fixed"]


def test_a_ratio_comes_with_what_resampling_says_of_it() -> None:
    steady = figures.ratio([9.0] * 20, [10.0] * 20)
    assert steady == {"value": 0.9, "from": 0.9, "to": 0.9}
    drifting = [10.0 * (1 + i % 5) for i in range(50)]  # both halves alike: no part of the ratio
    assert figures.ratio([0.9 * rate for rate in drifting], drifting)["to"] == 0.9
    uncertain = figures.ratio([8.0, 10.0] * 10, [10.0] * 20)
    assert uncertain["value"] == 0.9
    assert 0.8 < uncertain["from"] < 0.9 < uncertain["to"] < 1.0


class Worker(BaseHTTPRequestHandler):
    """Answers as a server does; every tenth room fails."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        failed = body["bootstrap_room"] % 10 == 3
        answer = json.dumps({"output_ids": [body["bootstrap_room"]]}).encode()
        self.send_response(500 if failed else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_a_client_counts_what_was_completed_and_stops_when_told(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Worker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prefill, decode = (End(name, "127.0.0.1", server.server_port) for name in ("p", "d"))
        ends = Ends(prefill, decode, 1)
        shape = Shape(40, 2, 4, 1, 1)
        job = Job(ends, shape, 1, str(tmp_path / "board"), str(tmp_path / "replies"))
        job.save(tmp_path / "job")
        assert Job.read(tmp_path / "job") == job
        client.main(str(tmp_path / "job"))
        replies = client.read_replies(tmp_path / "replies")
        with Board.on(tmp_path / "board") as board:
            assert board.completed == sum(reply.ids is not None for reply in replies) == 36
            assert sum(bool(reply.error) for reply in replies) == 4
            board.stop()
        client.main(str(tmp_path / "job"))
        assert len(client.read_replies(tmp_path / "replies")) == shape.concurrency
        server.shutdown()


def test_percentiles_are_values_that_occurred() -> None:
    assert figures.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert figures.percentile([float(i) for i in range(1, 101)], 0.99) == 99.0
    assert figures.percentile([7.0], 0.99) == 7.0


def test_an_answer_stock_never_gave_is_wrong() -> None:
    answers = Answers()
    answers.learn(replies((1, 2), (1, 3)))  # stock in two ways: both are right
    answers.given("stock", replies((1, 2)))
    answers.given("fixed", replies((1, 3), (9, 9)))
    verdict = answers.verdict()
    assert verdict["wrong"] == {"stock": 0, "fixed": 1}
    assert verdict["prompts_stock_answers_in_two_ways"] == 1


def replies(*answers: tuple[int, ...]) -> list[Reply]:
    return [Reply(Request(0).prompt, ids, False, "") for ids in answers]


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
    path = Path(interposers.__file__)
    lines = path.read_text().splitlines()
    over = next(n for n, line in enumerate(lines, 1) if "return self._stock.send_mul" in line)
    own = next(n for n, line in enumerate(lines, 1) if "self._ledger.put(chunk)" in line)
    stacks = [f"send ({path}:{over});send_multipart (/zmq/socket.py:1) 7", f"put ({path}:{own}) 2"]
    assert share.count(stacks) == {"ours": 2, "sglang": 7}


LIMITS = memory.Limits(memory=100, unserved=200, kept_back=15)


def test_every_table_of_the_ledgers_is_bounded() -> None:
    result = memory.measure(20_000, 1, lambda line: None, LIMITS)
    assert result["requests"] == 20_000 and all(result["kinds"].values())
    assert set(result["largest"]) == set(result["bounds"])
    over = {name: size for name, size in result["largest"].items() if size > result["bounds"][name]}
    assert over == {}
    full = {name for name, size in result["largest"].items() if size == result["bounds"][name]}
    wanted = {"finished", "unsent", "unserved", "kept", "poisoned", "refused"}
    assert full >= {f"prefill {name}" for name in wanted}, "each bound was reached"


def test_a_table_without_its_bound_is_named() -> None:
    """The control: what a ledger without bounds keeps of the same requests."""
    result = memory.measure(5000, 1, lambda line: None, memory.Limits(10**9, 10**9, 10**9))
    said = " ".join(memory.exceeded({**result, "bounds": memory.bounds(LIMITS), "growth_mib": 0}))
    for name in ("rooms", "leases", "attempt_ids", "finished", "unsent", "unserved", "refused"):
        assert f"prefill {name}: " in said
    grown = {**result, "bounds": {}, "growth_mib": memory.GROWTH_MIB + 1}
    assert memory.exceeded(grown) == [f"memory grew by {memory.GROWTH_MIB + 1} MiB"]
