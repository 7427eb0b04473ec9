"""The manifest never calls a fix in force without its proof."""

from __future__ import annotations

import dataclasses

import pytest

from sglang_scaling_fixes import fixes
from sglang_scaling_fixes.config import FIX_NAMES, Config
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.fixes import State


def arm_with(monkeypatch: pytest.MonkeyPatch, arm: object) -> list[fixes.Status]:
    first = dataclasses.replace(fixes.FIXES[0], arm=arm)
    monkeypatch.setattr(fixes, "FIXES", (first, *fixes.FIXES[1:]))
    return fixes.arm_all(Config(fixes=("safe-reclaim",)))


def test_every_fix_is_reported_in_order() -> None:
    assert tuple(s.name for s in fixes.arm_all(Config())) == FIX_NAMES


def test_not_asked_for_is_off_and_nothing_is_touched() -> None:
    states = {s.name: s.state for s in fixes.arm_all(Config(fixes=()))}
    assert states["safe-reclaim"] is State.OFF


def test_proven_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = arm_with(monkeypatch, lambda config: "proven")
    assert (statuses[0].state, statuses[0].reason) == (State.ARMED, "proven")
    assert fixes.refusal(statuses, Config(fixes=("safe-reclaim",))) is None


@pytest.mark.parametrize("error", [AttachError("it moved"), RuntimeError("it broke"), KeyError(1)])
def test_whatever_goes_wrong_while_arming_refuses_the_start(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(config: Config) -> str:
        raise error

    statuses = arm_with(monkeypatch, broken)
    assert statuses[0].state is State.UNSUPPORTED
    line = fixes.refusal(statuses, Config(fixes=("safe-reclaim",)))
    assert line is not None and "safe-reclaim" in line and "\n" not in line


def test_a_fix_that_does_not_exist_yet_refuses_the_start() -> None:
    config = Config(fixes=("layer-split",))
    line = fixes.refusal(fixes.arm_all(config), config)
    assert line is not None and "layer-split" in line
