"""What an idle scheduler of the lab does each time it finds nothing to run."""

from __future__ import annotations

import time
from types import ModuleType

import pytest

from sglang_scaling_fixes.lab.standins import idle


@pytest.mark.parametrize("name", ["on_idle", "self_check_during_idle"])
def test_it_does_what_stock_does_and_rests(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Before 0.5.11 the method had the other name."""
    done: list[object] = []

    def idles(_scheduler: object) -> str:
        done.append("checked")
        return "stock's"

    Mixin = type("Mixin", (), {name: idles})

    class Scheduler(Mixin):  # type: ignore[misc, valid-type]
        pass

    module = ModuleType("scheduler")
    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    monkeypatch.setattr(time, "sleep", done.append)
    idle.rest_when_idle(module)
    assert getattr(Scheduler(), name)() == "stock's"
    assert done == ["checked", idle.REST_S]
