"""`lab serve`: what it refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.serve import Options, prompt, serving
from sglang_scaling_fixes.lab.standins import gpu

torch = pytest.importorskip("torch")

from sglang_scaling_fixes.lab.standins import corrupt  # noqa: E402

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


def test_an_id_says_what_to_corrupt() -> None:
    assert corrupt.parse("corrupt:noise:0.5:40:x") == ("noise", 0.5, 40)


@pytest.mark.parametrize(
    "rid",
    ["corrupt:", "corrupt:noise:1", "corrupt:ink:1:0", "corrupt:zero:2:0", "corrupt:zero:1:x"],
)
def test_an_id_that_does_not_say_it(rid: str) -> None:
    with pytest.raises(ValueError, match="does not say what to corrupt"):
        corrupt.parse(rid)


def test_corruption_waits_for_its_time_and_leaves_the_rest() -> None:
    pool = SimpleNamespace(kv_buffer=[torch.ones(8, 1, 4), torch.ones(8, 1, 4)])
    slots, corruptor = torch.arange(1, 7), corrupt.Corruptor()
    corruptor.visit("corrupt:zero:0.5:2", slots[:4], pool)
    corruptor.visit("other", slots, pool)
    assert all(buffer.all() for buffer in pool.kv_buffer)
    corruptor.visit("corrupt:zero:0.5:2", slots, pool)
    for buffer in pool.kv_buffer:
        assert buffer[:, 0, 0].tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
