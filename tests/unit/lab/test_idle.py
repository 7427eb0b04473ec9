"""What an idle scheduler of the lab does each time it finds nothing to run."""

from __future__ import annotations

import time
from types import ModuleType

import pytest

from sglang_scaling_fixes.lab.standins import idle


def test_it_does_what_stock_does_and_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    class Mixin:
        def on_idle(self) -> str:
            done.append("checked")
            return "stock's"

    class Scheduler(Mixin):
        pass

    module = ModuleType("scheduler")
    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    monkeypatch.setattr(time, "sleep", done.append)
    idle.rest_when_idle(module)
    assert Scheduler().on_idle() == "stock's"
    assert done == ["checked", idle.REST_S]
