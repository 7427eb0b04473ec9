"""`layersplit plan` through the command line: what it prints, refuses and does not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.layersplit.planner.labels import FORMULAS
from sglang_scaling_fixes.layersplit.planner.layout import WIDTH
from tests.layersplit.figures import figures

FLAGS = {
    "--model": "glm-5.1",
    "--cp": "8",
    "--kv-dtype": "fp8",
    "--mem": "26.22GiB",
    "--context": "40K,80K,120K",
    "--hit-rate": "0.9",
}


def words(**changed: str) -> list[str]:
    flags = FLAGS | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return ["layersplit", "plan", *(word for flag in flags.items() for word in flag)]


def made(capsys: pytest.CaptureFixture[str], **changed: str) -> dict[str, Any]:
    assert cli.main([*words(**changed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def unlabelled(plan: dict[str, Any]) -> set[str]:
    """Figures without kind and formula. Inputs and what others published carry their own."""
    known = {path for path, label in plan["labels"].items() if label["formula"]}
    assert {label["kind"] for label in plan["labels"].values()} <= {
        *("measured", "published", "modelled")
    }
    others = {key: value for key, value in plan.items() if key not in ("assumptions", "published")}
    return {
        path
        for path in figures(others)
        if not any(path == one or path.startswith(one + ".") for one in known)
    }


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = made(capsys)
    assert plan["capacity_tokens"].keys() == {"unsplit", "upstream", "ours"}
    assert [row["context"] for row in plan["rows"]] == [40_000, 80_000, 120_000]
    for row in plan["rows"]:
        assert row["bytes_per_forward"]["ours"] < row["bytes_per_forward"]["upstream"] / 25
        assert row["exposed_ms"]["ours"] < 0.01 * row["compute_ms"] < row["exposed_ms"]["upstream"]
        assert row["layers"][0]["ours"]["exposed_ms"] > 0
        assert {run["ours"]["exposed_ms"] for run in row["layers"][1:]} == {0}
        held = row["contexts_held"]
        assert held == {
            name: tokens // row["context"] for name, tokens in plan["capacity_tokens"].items()
        }
        gain = row["gain"]["over_unsplit"]
        assert gain["contexts_held"] == pytest.approx(held["ours"] / held["unsplit"], abs=1e-4)
        assert gain["request_speed"] < 1 < row["gain"]["over_upstream"]["request_speed"]


def test_every_figure_has_a_kind_and_a_formula(capsys: pytest.CaptureFixture[str]) -> None:
    plan = made(capsys)
    assert unlabelled(plan) == set()
    assert {one["kind"] for one in plan["assumptions"].values()} == {
        *("given", "assumed", "published")
    }
    assert {one["kind"] for one in plan["published"]} == {"published"}
    used = set(figures(plan))
    for path in FORMULAS:
        assert any(one == path or one.startswith(path + ".") for one in used), path


def test_control_a_figure_without_a_formula_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    plan = made(capsys)
    del plan["labels"]["rows.compute_ms"]
    plan["rows"][0]["gain"]["over_all"] = 2.32
    assert unlabelled(plan) == {"rows.compute_ms", "rows.gain.over_all"}


def test_the_layers_are_told_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    for mtp, layers in (("none", 78), ("whole", 79), ("split", 79)):
        for row in made(capsys, mtp=mtp)["rows"]:
            told = [n for run in row["layers"] for n in range(run["first"], run["last"] + 1)]
            assert told == list(range(layers))


def test_a_pool_that_holds_no_context_has_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    plan = made(capsys, mem="3GiB", context="120K")
    (row,) = plan["rows"]
    assert row["contexts_held"]["unsplit"] == 0 < row["contexts_held"]["ours"]
    assert row["gain"]["over_unsplit"]["contexts_held"] is None
    assert cli.main(words(mem="3GiB", context="120K")) == 0


@pytest.mark.parametrize("mtp", ["none", "split"])
def test_the_plan_as_text(mtp: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = made(capsys, mtp=mtp, context="202752,1", mem="1000GiB")
    assert cli.main(words(mtp=mtp, context="202752,1", mem="1000GiB")) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    for tokens in plan["capacity_tokens"].values():
        assert f"{tokens:,}" in text
    assert "457,920" in text and "#29930" in text and "unmerged" in text
    for formula in (*FORMULAS, *plan["assumptions"]):
        assert formula in text
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")][2:]
    assert [title for title in titles if "modelled" in title] == titles[:4]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "glm-9"}, "--model 'glm-9'"),
        ({"cp": "1"}, "--cp '1' is not a number of ranks for glm-5.1; write one of 2 to 78"),
        ({"cp": "79"}, "--cp '79'"),
        ({"cp": "eight"}, "--cp 'eight'"),
        ({"cp": "9" * 5000}, "2 to 78"),
        ({"kv_dtype": "int4"}, "--kv-dtype 'int4' is not known; write bf16 or fp8 or fp8-raw"),
        ({"mem": "x"}, "--mem 'x' is not a size; write a number and one of GiB, MiB, GB, MB"),
        ({"mem": "26.22"}, "--mem '26.22'"),
        ({"mem": "-1GiB"}, "--mem '-1GiB'"),
        ({"mem": "GiB"}, "--mem 'GiB'"),
        ({"mem": "0GiB"}, "write at least"),
        ({"context": "x"}, "--context 'x' is not a number of tokens; write 40000, or 40K"),
        ({"context": "40K,"}, "--context ''"),
        ({"context": "0"}, "--context '0'"),
        ({"context": "40k"}, "--context '40k'"),
        ({"context": "0.0001K"}, "--context '0.0001K'"),
        ({"context": "40K,300K"}, "--context 300000: glm-5.1 reads at most 202752 tokens"),
        ({"hit_rate": "1.1"}, "--hit-rate '1.1' is not a share; write a number from 0 to 1"),
        ({"hit_rate": "90%"}, "--hit-rate '90%'"),
        ({"hit_rate": "nan"}, "--hit-rate 'nan'"),
        ({"mtp": "half"}, "--mtp 'half' is not known; write none or whole or split"),
        ({"scratch_tokens": "219199"}, "--scratch-tokens 219199 does not hold one context"),
        ({"scratch_tokens": "100"}, "write at least 219200"),
        ({"chunked_prefill_size": "-1"}, "--chunked-prefill-size '-1'"),
        ({"bandwidth_gb_s": "0"}, "--bandwidth-gb-s '0'"),
        ({"tflops": "inf"}, "--tflops 'inf'"),
        ({"upstream_hides": "2"}, "--upstream-hides '2'"),
    ],
)
def test_bad_input_is_one_line_that_names_flag_value_and_remedy(
    changed: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    assert cli.main([*words(), *flags]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    ("changed", "flag"),
    [({"mem": "1GiB"}, "mem"), ({"scratch_tokens": "5"}, "scratch_tokens")],
)
def test_the_remedy_is_the_least_that_works(
    changed: dict[str, str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(**changed)) == 2
    found = re.search(r"write at least ([0-9.]+)(\w*)", capsys.readouterr().err)
    assert found is not None
    number, unit = found[1], found[2]
    assert cli.main(words(**{flag: number + unit})) == 0
    less = f"{float(number) - 0.01:.2f}GiB" if unit else str(int(number) - 1)
    assert cli.main(words(**{flag: less})) == 2


def test_sizes_and_lengths_have_the_units_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"28GB": 28 * 10**9, "26.22GiB": int(26.22 * (1 << 30)), "28000MB": 28 * 10**9}
    for mem, size in sizes.items():
        assert made(capsys, mem=mem)["assumptions"]["memory"]["value"] == size
    plan = made(capsys, context="1.5K,1500")
    assert [row["context"] for row in plan["rows"]] == [1500, 1500]


def test_it_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys; from sglang_scaling_fixes import cli;"
        f"status = cli.main({words()!r}); print('MODULES', *sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.partition("MODULES")[2].split())
    assert "sglang_scaling_fixes.layersplit.planner.plan" in modules
    assert not {"torch", "sglang", "numpy", "transformers"} & modules


def test_no_server_imports_the_planner() -> None:
    code = "import sys, {}; print(*sys.modules)"
    found = {}
    for module in ("sglang_scaling_fixes.plugin", "sglang_scaling_fixes.cli"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
        )
        loaded = done.stdout.split()
        assert "sglang_scaling_fixes.layersplit" in loaded
        found[module] = any("layersplit.planner" in name for name in loaded)
    assert found == {"sglang_scaling_fixes.plugin": False, "sglang_scaling_fixes.cli": True}
