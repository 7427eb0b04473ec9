"""`layersplit simulate` through the command line: what it prints, draws, refuses and imports."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.layersplit.planner.layout import WIDTH
from sglang_scaling_fixes.layersplit.simulator import picture
from sglang_scaling_fixes.layersplit.simulator.labels import FORMULAS
from sglang_scaling_fixes.layersplit.simulator.progress import Bar
from sglang_scaling_fixes.paths import ROOT
from tests.layersplit.figures import figures

TRACES = ROOT / "benchmarks" / "layersplit" / "traces"
AIPERF = str(TRACES / "agentic_code_30sessions_seed42.jsonl")
MOONCAKE = str(TRACES / "mooncake_conversation_head200.jsonl")
FLAGS = ("--model", "glm-5.1", "--cp", "8", "--mem", "26.22GiB")


def words(trace: str = MOONCAKE, *more: str) -> list[str]:
    return ["layersplit", "simulate", trace, *FLAGS, *more]


@functools.cache
def printed(*asked: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main([*words(*asked), "--json"]) == 0
    return out.getvalue()


def made(*asked: str) -> dict[str, Any]:
    found = json.loads(printed(*asked))
    assert isinstance(found, dict)
    return found


def unlabelled(found: dict[str, Any]) -> set[str]:
    shown = {name: found[name] for name in ("trace", "pools", "gain")}
    return {
        path
        for path in figures(shown)
        if not any(path == one or path.startswith(one + ".") for one in found["labels"])
    }


def test_the_replay_as_json() -> None:
    found = made(AIPERF)
    unsplit, upstream, ours = found["pools"]
    assert [one["name"] for one in found["pools"]] == ["unsplit", "upstream", "ours"]
    assert found["trace"]["requests"] == 385 == ours["requests"]["answered"]
    assert unsplit["hit_rate"] < 0.5 and ours["hit_rate"] == upstream["hit_rate"] > 0.9
    assert ours["hit_rate"] <= found["trace"]["reuse"]
    assert ours["goodput_tokens_s"] > upstream["goodput_tokens_s"] > unsplit["goodput_tokens_s"]
    for one in found["pools"]:
        assert sum(one["gpu_s"].values()) == pytest.approx(one["span_s"], abs=0.01)
        total = found["trace"]["prompt_tokens"]
        assert one["goodput_tokens_s"] == pytest.approx(total / one["span_s"], rel=1e-3)
    assert unsplit["gpu_s"]["exposed_broadcast"] == 0 < ours["gpu_s"]["exposed_broadcast"]
    gain = found["gain"]["over_unsplit"]["goodput_tokens_s"]
    assert gain == pytest.approx(ours["goodput_tokens_s"] / unsplit["goodput_tokens_s"], abs=1e-3)


def test_every_figure_has_a_formula_and_is_modelled() -> None:
    found = made()
    assert unlabelled(found) == set()
    assert {one["kind"] for one in found["labels"].values()} == {"modelled"}
    used = set(figures(found))
    for path in FORMULAS:
        assert any(one == path or one.startswith(path + ".") for one in used), path
    del found["labels"]["pools.hit_rate"]  # control
    assert unlabelled(found) == {"pools.hit_rate"}


def test_a_late_answer_is_no_goodput() -> None:
    free, strict = made(AIPERF), made(AIPERF, "--ttft-limit", "1")
    for one, other in zip(free["pools"], strict["pools"], strict=True):
        assert one["requests"]["late"] == 0 < other["requests"]["late"]
        assert other["goodput_tokens_s"] < one["goodput_tokens_s"]
        assert other["ttft_s"] == one["ttft_s"]


def test_a_host_gives_back_what_the_pool_lost() -> None:
    without, with_host = made(AIPERF), made(AIPERF, "--host-mem", "100GiB")
    small, large = without["pools"][0], with_host["pools"][0]
    assert small["loaded_rate"] == 0 < large["loaded_rate"]
    assert large["hit_rate"] + large["loaded_rate"] > small["hit_rate"] + 0.3
    assert with_host["pools"][2]["host_tokens"] > 7 * large["host_tokens"]


def test_nothing_is_answered_where_nothing_fits() -> None:
    """No pool but upstream's, which keeps no compact scratch, has room for any first prompt."""
    found = made(AIPERF, "--mem", "0.66GiB")
    unsplit, upstream, ours = found["pools"]
    assert unsplit["requests"]["answered"] == 0 and unsplit["hit_rate"] is None
    assert unsplit["goodput_tokens_s"] == 0 and unsplit["ttft_s"]["mean"] is None
    assert found["gain"]["over_unsplit"]["goodput_tokens_s"] is None
    assert unsplit["requests"]["refused"] == ours["requests"]["refused"] == 385
    assert 0 < upstream["requests"]["answered"] == 385 - upstream["requests"]["refused"]
    assert cli.main(words(AIPERF, "--mem", "0.66GiB")) == 0


def test_the_replay_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    found = made(AIPERF)
    assert cli.main(words(AIPERF)) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= WIDTH
    assert shown.err == ""  # no terminal, no bar
    assert "Nothing here is measured" in shown.out
    for one in found["pools"]:
        assert f"{one['capacity_tokens']:,}" in shown.out
        assert f"{one['hit_rate']:.1%}" in shown.out
        assert f"{one['goodput_tokens_s']:,.0f}" in shown.out
    for name in (*FORMULAS, *found["assumptions"]):
        assert name in shown.out


def test_the_picture_has_each_figure(tmp_path: Path) -> None:
    file = tmp_path / "p.svg"
    found = made(AIPERF, "--svg", str(file), "--host-mem", "40GiB")
    root = ElementTree.fromstring(file.read_text())
    shown = {element.text for element in root.iter() if element.tag.endswith("text")}
    for one in found["pools"]:
        assert {one["name"], f"{one['goodput_tokens_s'] / 1e3:.1f}"} <= shown
        assert f"{one['hit_rate'] + one['loaded_rate']:.1%}" in shown
    bars = [element for element in root.iter() if element.tag.endswith("rect")]
    assert all(float(bar.get("height", "-1")) >= 0 for bar in bars)


def test_the_committed_replay_is_what_the_command_prints() -> None:
    found = made(AIPERF)
    assert found == json.loads((TRACES.parent / "results" / "simulate.json").read_text())
    assert picture.svg(found) == (ROOT / "docs" / "layersplit-simulate.svg").read_text()
    document = (ROOT / "docs" / "layersplit.md").read_text()
    for name, shape, value in (
        ("pool, tokens", "{:,}", lambda pool: pool["capacity_tokens"]),
        ("contexts held", "{}", lambda pool: pool["contexts_held"]),
        ("hits in the pool", "{:.1%}", lambda pool: pool["hit_rate"]),
        ("goodput, tokens/s", "{:,.0f}", lambda pool: pool["goodput_tokens_s"]),
        ("tokens per busy s", "{:,.0f}", lambda pool: pool["busy_tokens_s"]),
        ("TTFT, mean, s", "{:.2f}", lambda pool: pool["ttft_s"]["mean"]),
    ):
        cells = [shape.format(value(pool)) for pool in found["pools"]]
        assert f"| {' | '.join([name, *cells])} |" in document


@pytest.mark.parametrize(
    ("more", "goodput", "busy"),
    [
        ((), 1.37, 8.01),
        (("--faster", "4"), 1.59, 8.20),
        (("--tflops", "150"), 4.10, 8.38),
        (("--host-mem", "100GiB"), 1.00, 1.10),
    ],
)
def test_gains_under_other_assumptions_are_those_of_the_document(
    more: tuple[str, ...], goodput: float, busy: float
) -> None:
    gain = made(AIPERF, *more)["gain"]["over_unsplit"]
    shown = (f"{gain['goodput_tokens_s']:.2f}", f"{gain['busy_tokens_s']:.2f}")
    assert shown == (f"{goodput:.2f}", f"{busy:.2f}")
    said = f"`{' '.join(more)}`" if more else "no other flag"
    document = (ROOT / "docs" / "layersplit.md").read_text()
    assert f"| {said} | {goodput:.2f}x | {busy:.2f}x |" in document


def test_a_picture_is_not_lost_to_a_replay_that_cannot_start(tmp_path: Path) -> None:
    file = tmp_path / "p.svg"
    file.write_text("before")
    assert cli.main(words(MOONCAKE, "--svg", str(file), "--mem", "0.1GiB")) == 2
    assert file.read_text() == "before"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_it_is() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        bar = Bar(stream)
        for done in range(51):
            bar("ours", done, 50)
        bar.close()
    assert "50 of 50" in terminal.getvalue() and terminal.getvalue().endswith("\x1b[K")
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "glm-9"], "--model 'glm-9' is not known; write glm-5.1"),
        (["--cp", "1"], "--cp '1'"),
        (["--mem", "0.1GiB"], "--mem of 0.10 GiB does not hold two scratches"),
        (["--scratch-tokens", "100"], "--scratch-tokens 100 does not hold one context"),
        (["--format", "csv"], "--format 'csv' is not known; write auto or mooncake or aiperf"),
        (["--block-size", "0"], "--block-size '0' is not a number of tokens of a block; write"),
        (["--block-size", "64"], "line 1: 14 hash_ids for 6758 tokens; blocks of 64"),
        (["--format", "aiperf"], "line 1: no session_id"),
        (["--faster", "0"], "--faster '0' is not a speed; write a number from 0.001"),
        (["--ttft-limit", "soon"], "--ttft-limit 'soon' is not a time; write a number from 0"),
        (["--host-mem", "lots"], "--host-mem 'lots' is not a size"),
        (["--load-gb-s", "-1"], "--load-gb-s '-1'"),
        (["--transfer-gb-s", "0"], "--transfer-gb-s '0'"),
        (["--hold-us", "-1"], "--hold-us '-1'"),
        (["--output-ms", "nan"], "--output-ms 'nan'"),
        (["--svg", "/nowhere/p.svg"], "--svg '/nowhere/p.svg': No such file"),
    ],
)
def test_bad_input_is_one_line_that_names_flag_value_and_remedy(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = [f"{flag}={value}" for flag, value in zip(more[::2], more[1::2], strict=True)]
    assert cli.main(words(MOONCAKE, *joined)) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_trace_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("nowhere.jsonl")) == 2
    assert "TRACE nowhere.jsonl: No such file" in capsys.readouterr().err


def test_it_imports_neither_torch_nor_sglang_and_no_server_imports_it() -> None:
    code = (
        "import sys; import sglang_scaling_fixes.plugin;"
        "server = [name for name in sys.modules if 'layersplit.simulator' in name];"
        "assert not server, server; from sglang_scaling_fixes import cli;"
        f"status = cli.main({words()!r}); print('MODULES', *sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.partition("MODULES")[2].split())
    assert "sglang_scaling_fixes.layersplit.simulator.engine" in modules
    assert not {"torch", "sglang", "numpy", "transformers"} & modules
