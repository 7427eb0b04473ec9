"""Ends that stock cannot catch: of a server that must not go on, and of a start without us."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import pytest

import sglang_scaling_fixes
from sglang_scaling_fixes import entry
from sglang_scaling_fixes.alarm import end_server
from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.fixes import SETTINGS
from sglang_scaling_fixes.specguard.flags import ACTION


def swallows() -> None:
    """As stock does around a request's failure and a deferred release."""
    try:
        end_server("slots are lost")
    except Exception as error:
        raise AssertionError("stock would carry on") from error


def test_an_alarm_passes_through_what_stock_catches() -> None:
    with pytest.raises(SystemExit, match="slots are lost"):
        swallows()


def test_the_server_is_told_as_a_stock_scheduler_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=12345))
    monkeypatch.setattr(os, "kill", lambda *who: told.append(who))
    with pytest.raises(SystemExit):
        end_server("slots are lost")
    assert told == [(12345, signal.SIGQUIT)]


def test_a_plugin_that_cannot_be_imported_stops_a_start_that_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stock logs an ImportError and starts without it; nothing of ours is there to say no."""
    arming = [setting.env for setting in SETTINGS if setting.arms]
    assert [PLUGIN_ENV, *arming] == [entry._PLUGIN, entry._GUARD]
    monkeypatch.setitem(sys.modules, "sglang_scaling_fixes.plugin", None)
    # Another test may have imported it: then it is there as a name of its package too.
    monkeypatch.delattr(sglang_scaling_fixes, "plugin", raising=False)
    for name, value in ((PLUGIN_ENV, "safe-reclaim"), (ACTION.env, "abort")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(SystemExit, match=f"{name}={value}.*cannot be imported"):
                entry.activate()
    for off in (" none ", ""):
        monkeypatch.setenv(PLUGIN_ENV, off)
        with pytest.raises(ImportError):
            entry.activate()
