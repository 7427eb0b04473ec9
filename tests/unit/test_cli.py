"""The command line: what it prints, and what its exit status means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes import cli, doctor
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.races import run as race
from sglang_scaling_fixes.lab.races.report import race_table

HALF = {
    **{"requests": 9, "aborted": 3, "victims": 3, "refused": 0},
    **{"corrupted_pages": 0, "wrong_outputs": 0},
}


def result(corrupted: int) -> dict[str, Any]:
    stock = {**HALF, "corrupted_pages": 2700, "wrong_outputs": 3}
    fixed = {**HALF, "corrupted_pages": corrupted}
    return {
        "release": "0.5.12",
        "scenario": "abort",
        "transport": "tcp",
        "stock": stock,
        "fixed": fixed,
        "stock_safe": False,
    }


@pytest.mark.parametrize(("corrupted", "status"), [(0, 0), (1, 1)])
def test_reclaim_prints_both_halves_and_fails_if_the_fix_did(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    corrupted: int,
    status: int,
) -> None:
    monkeypatch.setattr(race, "run", lambda *_, **__: result(corrupted))
    written = tmp_path / "demo.json"
    assert cli.main(["lab", "reclaim", "--release", "0.5.12", "--output", str(written)]) == status
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if line[:5] in ("stock", "fixed")] == [
        "stock",
        "fixed",
    ]
    assert "2700" in next(line for line in table if line.startswith("stock"))
    assert json.loads(written.read_text()) == result(corrupted)


def test_where_stock_is_safe_the_table_says_so() -> None:
    safe = {**result(0), "stock": HALF, "stock_safe": True}
    assert "Stock is safe here" in race_table(safe)
    assert "Stock is safe here" not in race_table(result(0))


def test_lab_errors_are_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise LabError("unknown scenario 'x'; there are: abort")

    monkeypatch.setattr(race, "run", run)
    assert cli.main(["lab", "reclaim", "--release", "0.5.12", "--scenario", "x"]) == 2
    assert capsys.readouterr().err == (
        "sglang-scaling-fixes: unknown scenario 'x'; there are: abort\n"
    )


@pytest.mark.parametrize("rounds", ["0", "-1", "many", "1001"])
def test_rounds_are_checked(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "reclaim", "--release", "0.5.12", "--rounds", rounds])
    assert ended.value.code == 2
    assert "1 to 1000" in capsys.readouterr().err


DOCTOR: dict[str, Any] = {
    "sglang": "0.5.12",
    "mooncake": None,
    "plugin": {"loaded": True, "reason": "called", "folder": "/somewhere", "copies": []},
    "asked": ["safe-reclaim"],
    "untested": None,
    "patches": [],
    "proof": None,
    "standins": True,
    "fixes": [
        {"name": "safe-reclaim", "state": "armed", "reason": "because"},
        {"name": "spec-guard", "state": "unsupported", "reason": "not yet"},
    ],
}


@pytest.mark.parametrize(("state", "status"), [("armed", 0), ("native", 0), ("unsupported", 1)])
def test_doctor_fails_unless_all_asked_for_is_in_force(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, status: int
) -> None:
    first, second = DOCTOR["fixes"]
    found = {**DOCTOR, "fixes": [{**first, "state": state}, second]}
    monkeypatch.setattr(doctor, "report", lambda asked, again: found)
    assert cli.main(["doctor"]) == status
    text = capsys.readouterr().out
    assert "* safe-reclaim" in text and "not installed" in text
    assert "loaded by SGLang from /somewhere" in text
    assert cli.main(["doctor", "--json"]) == status
    assert json.loads(capsys.readouterr().out) == found


def test_doctor_says_once_why_the_plugin_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = {"loaded": False, "reason": "no loader", "folder": None, "copies": []}
    lost = [{**fix, "state": "unsupported", "reason": "no loader"} for fix in DOCTOR["fixes"]]
    monkeypatch.setattr(
        doctor, "report", lambda asked, again: {**DOCTOR, "plugin": plugin, "fixes": lost}
    )
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NOT LOADED by servers here: no loader" in text
    assert text.count("no loader") == 1


def test_doctor_names_every_copy_of_the_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [{"version": "1.0", "folder": "/one"}, {"version": "0.9", "folder": "/two"}]
    plugin = {**DOCTOR["plugin"], "copies": copies}
    monkeypatch.setattr(doctor, "report", lambda asked, again: {**DOCTOR, "plugin": plugin})
    assert cli.main(["doctor"]) == 0
    assert "1.0 in /one, 0.9 in /two" in capsys.readouterr().out


def test_serve_passes_on_what_stands_behind_the_dashes() -> None:
    args = cli._parser().parse_args(["lab", "serve", "--pd", "--once", "--", "--plugin", "--x=1"])
    assert args.flags == ["--plugin", "--x=1"]
    assert (args.pd, args.hicache, args.spec, args.once) == (True, False, False, True)


def test_serve_names_the_models_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["lab", "serve", "--model", "glm-5.1"])
    assert "choose from tiny-glm-5.1" in capsys.readouterr().err.replace("'", "")
