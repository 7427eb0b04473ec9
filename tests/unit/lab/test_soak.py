"""When a soak has failed, and what its command takes and prints."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.lab.races import soak
from sglang_scaling_fixes.lab.races.report import SOAK_ROWS

RESULT: dict[str, Any] = {
    **dict.fromkeys(SOAK_ROWS, 0),
    "release": "0.5.23",
    "minutes": 1.0,
    "half": "fixed",
    "transport": "tcp",
    "frees_by_proof": {"P2": 3},
    "refusals": {"Decode transfer failed": 2},
    "decode_crashed": False,
    "run_dir": "/runs/1",
}


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, 0),
        ({"refused": 5}, 0),
        ({"corrupted_outputs": 1}, 1),
        ({"corrupted_kv": 1}, 1),
        ({"leaked_tokens": 4}, 1),
        ({"leaked_metadata": 1}, 1),
        ({"held_tokens": 1}, 1),
        ({"unanswered": 1}, 1),
        ({"decode_crashed": True}, 1),
    ],
)
def test_a_soak_fails_if_anything_is_wrong_or_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    status: int,
) -> None:
    monkeypatch.setattr(soak, "run", lambda *_, **__: {**RESULT, **changed})
    assert cli.main(["lab", "soak", "--minutes", "1"]) == status
    shown = capsys.readouterr().out
    assert "P2 3" in shown and "2 x Decode transfer failed" in shown


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "much", "99999"])
def test_minutes_are_checked(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "soak", "--minutes", minutes])
    assert ended.value.code == 2
    assert "minutes" in capsys.readouterr().err


def test_error_texts_are_counted_without_what_differs() -> None:
    one = "failed for client-3-00012. room=195004 after 3.1s"
    other = "failed for client-1-00002. room=7 after 12s"
    assert soak.normal(one) == soak.normal(other) == "failed for RID room=N after Ns"
