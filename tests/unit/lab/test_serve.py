"""`lab serve`: what it refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers.serve import Options, prompt, serving
from sglang_scaling_fixes.lab.standins import gpu

NOWHERE = Environment("0.5.23", Path("/nowhere/python"), Path("/nowhere/sglang"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(layer_split=True), "add --pd and --cp 2"),
        (Options(layer_split=True, pd=True), "add --pd and --cp 2"),
        (Options(layer_split=True, pd=True, cp=4), "the model has 3 layers"),
    ],
)
def test_what_stock_cannot_do_is_said_at_once(options: Options, words: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=words), serving(options, NOWHERE, tmp_path):
        pass


@pytest.mark.parametrize("pd", [False, True])
def test_never_beside_a_gpu(pd: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "present", lambda: "/dev/nvidia0")
    with (
        pytest.raises(LabError, match=r"never runs beside a GPU \(/dev/nvidia0\)"),
        serving(Options(pd=pd), NOWHERE, tmp_path),
    ):
        pass


def test_prompts_repeat_themselves() -> None:
    asked = prompt(90, seed=2)
    assert asked == prompt(90, seed=2)
    assert len(asked) == 90
    assert asked[60:] == asked[:30]
