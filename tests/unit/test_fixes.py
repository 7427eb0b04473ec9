"""The manifest never calls a fix in force without its proof."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from sglang_scaling_fixes import fixes, flags, ordering
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import AttachError, ConfigError
from sglang_scaling_fixes.fix import Armed, Native
from sglang_scaling_fixes.fixes import FIX_NAMES, FixState

Arm = Callable[[Config], Armed | Native]


def arm_with(monkeypatch: pytest.MonkeyPatch, arm: Arm) -> list[fixes.Status]:
    monkeypatch.setattr(fixes.FIXES[0], "arm", arm)
    return fixes.arm_all(Config(fixes=("safe-reclaim",)))


def test_every_fix_is_reported_in_order() -> None:
    assert tuple(s.name for s in fixes.arm_all(Config())) == FIX_NAMES


def test_not_asked_for_is_off_and_nothing_is_touched() -> None:
    states = {s.name: s.state for s in fixes.arm_all(Config(fixes=()))}
    assert states["safe-reclaim"] is FixState.OFF


def test_proven_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = arm_with(monkeypatch, lambda config: Armed("proven"))
    assert (statuses[0].state, statuses[0].reason) == (FixState.ARMED, "proven")
    assert fixes.refusal(statuses, Config(fixes=("safe-reclaim",))) is None


@pytest.mark.parametrize("error", [AttachError("it moved"), RuntimeError("it broke"), KeyError(1)])
def test_whatever_goes_wrong_while_arming_refuses_the_start(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(config: Config) -> Armed:
        raise error

    statuses = arm_with(monkeypatch, broken)
    assert statuses[0].state is FixState.UNSUPPORTED
    line = fixes.refusal(statuses, Config(fixes=("safe-reclaim",)))
    assert line is not None and "safe-reclaim" in line and "\n" not in line


def test_a_fix_that_does_not_exist_yet_refuses_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixes.FIXES[0], "missing", "not built yet")
    statuses = arm_with(monkeypatch, lambda config: Armed("never asked"))
    line = fixes.refusal(statuses, Config(fixes=("safe-reclaim",)))
    assert line is not None and "safe-reclaim: not built yet" in line


def test_native_is_reported_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = arm_with(monkeypatch, lambda config: Native("it waits"))
    assert (statuses[0].state, statuses[0].reason) == (FixState.NATIVE, "it waits")
    assert fixes.refusal(statuses, Config(fixes=("safe-reclaim",))) is None


def test_an_error_is_of_the_fix_whose_code_raised_it() -> None:
    pdmux = SimpleNamespace(enable_pdmux=True, enable_hierarchical_cache=True)
    with pytest.raises(ConfigError) as caught:
        ordering.check(pdmux)
    assert fixes.raised_by(caught.value) is ordering.FIX
    with pytest.raises(ConfigError) as caught:
        flags.parse_fixes("no-such-fix", "--plugin")
    assert fixes.raised_by(caught.value) is None


def test_the_manifest_imports_neither_torch_nor_sglang() -> None:
    """It is read wherever the plugin is installed, whether or not a fix is asked for."""
    heavy = ("torch", "numpy", "sglang", "msgspec", "zmq", "prometheus_client")
    code = "import sys, sglang_scaling_fixes.plugin, sglang_scaling_fixes.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"sglang_scaling_fixes.reclaim", "sglang_scaling_fixes.doctor"} <= loaded
    assert not loaded & set(heavy)
