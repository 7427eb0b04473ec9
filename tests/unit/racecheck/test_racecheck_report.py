"""What a check says: exit status, text, the matrix, and the patched copy it runs on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang_scaling_fixes import cli, racecheck
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.racecheck import matrix

SIDE = {"access": "write", "operation": "copy", "stream": "load", "stack": ["a.py:1 f: copy()"]}
RACE: dict[str, Any] = {
    "buffer": "index_k[0]",
    "missing_edge": "stream 'forward' does not wait for stream 'load'",
    "earlier": SIDE,
    "later": {**SIDE, "access": "read", "operation": "GetK", "stream": "forward"},
}
ORDERED = {"name": "one", "verdict": "ordered", "races": 0, "found": []}
RACED = {"name": "two", "verdict": "race", "races": 4, "found": [RACE]}
ABSENT = {"name": "three", "verdict": "n/a", "races": 0, "reason": "there is none"}
MOVED = {"name": "four", "verdict": "n/a", "races": 0, "broken": "expected module:Class"}


def report(*hazards: dict[str, Any]) -> dict[str, Any]:
    return {"release": "0.5.9", "fixes": "off", "proof": "proof", "hazards": list(hazards)}


@pytest.mark.parametrize(
    ("hazards", "status"),
    [
        ((ORDERED, ABSENT), 0),
        ((ORDERED, RACED), 1),
        ((MOVED, ORDERED), 2),
        ((MOVED, RACED), 2),
    ],
)
def test_exit_status(
    hazards: tuple[dict[str, Any], ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(racecheck, "check", lambda *_: report(*hazards))
    assert cli.main(["racecheck", "--release", "0.5.9", "--json"]) == status
    assert json.loads(capsys.readouterr().out) == report(*hazards)


def test_text_shows_both_accesses_and_the_missing_edge() -> None:
    text = racecheck.text(report(ORDERED, RACED, ABSENT, MOVED))
    for part in ("RACE", "on 4 buffers", "write by copy", "read by GetK", RACE["missing_edge"]):
        assert part in text
    assert "there is none" in text and "expected module:Class" in text
    assert "a.py:1 f: copy()" in text


@pytest.mark.parametrize(
    ("release", "fixes", "says"),
    [
        ("0.4.0", "off", "unknown release '0.4.0'"),
        ("latest", "on", "unknown release 'latest'"),
    ],
)
def test_an_unknown_release_is_one_line_and_status_2(
    release: str, fixes: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["racecheck", "--release", release, "--fixes", fixes]) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1


def test_an_environment_without_sglang_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racecheck, "sglang_version", lambda: None)
    with pytest.raises(ConfigError, match="not installed"):
        racecheck.check()


def test_a_check_that_takes_too_long_is_one_line_and_no_race(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(racecheck, "_TIMEOUT_S", 0.0)
    assert cli.main(["racecheck"]) == 2
    line = capsys.readouterr().err
    assert "not checked within 0 s; try again" in line and line.count("\n") == 1


def test_matrix_shows_stock_and_fixed() -> None:
    fixed = {**RACED, "verdict": "ordered", "races": 0}
    refused = {**ABSENT, "reason": "refused at start: no"}
    text = matrix.render(
        {
            ("0.5.9", "off"): report(ORDERED, RACED, ABSENT, MOVED),
            ("0.5.9", "on"): report(ORDERED, fixed, refused, MOVED),
            ("0.5.10", "off"): {"hazards": [], "error": "no wheel"},
            ("0.5.10", "on"): {"hazards": [], "error": "no wheel"},
        }
    )
    assert "| 0.5.9 | ok | **4** → ok | – → refused | ? |" in text
    assert "| 0.5.10 | ? | ? | ? | ? |" in text
    assert "| 0.5.9 | proof |" in text and "| 0.5.10 | no wheel |" in text
