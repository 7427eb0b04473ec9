"""Releases that load no plugins, with the patch `plugin-loader`: what runs in them, and what holds.

The wheels' own code on the dependencies of the oldest lab release; no server is started. The
unpatched tree is the control.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.patches import change
from sglang_scaling_fixes.racecheck import patched
from tests import child
from tests.contract.wheels import source
from tests.patched_trees import FILES, KNOWN

RELEASE = "0.5.10.post1"
"""0.5.10 has the same files, but for a line behind ours in `engine.py`."""
ASKED = ("safe-reclaim", "early-send-ordering", "hicache-ordering", "resume")


def tree(folder: Path, *names: str) -> Path:
    """The release, with these patches."""
    target = patched.copied(source(RELEASE), folder, {*FILES})
    if names:
        change.apply(KNOWN, target, names)
    return target


def env(environment: Environment, target: Path, plugin: str | None) -> dict[str, str]:
    found = cpu_env({**environment.env, **({PLUGIN_ENV: plugin} if plugin else {})})
    return {**found, "PYTHONPATH": os.pathsep.join([str(target), found["PYTHONPATH"]])}


LOOK = """
import argparse, contextlib, io, json, runpy, sys
from unittest import mock

found, seen = {}, {}

def help_of(run):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with contextlib.suppress(SystemExit):
            run()
    return "--safe-reclaim-peer" in out.getvalue()

def calls(run):
    # What a function of stock's calls of ours, up to the first thing that it does itself.
    called = []
    with mock.patch("sglang_scaling_fixes.entry.activate", lambda: called.append(True)):
        with contextlib.suppress(BaseException):
            run()
    return bool(called)

class Stop(BaseException):
    pass

def stop(*_, **__):
    raise Stop

sys.argv = ["launch_server", "--help"]
found["launch_server"] = help_of(lambda: runpy.run_module("sglang.launch_server", {}, "__main__"))
from sglang.cli import serve
found["serve --help"] = help_of(lambda: serve.serve(None, ["--help"]))
from sglang.srt import server_args
with mock.patch.object(server_args, "prepare_server_args", stop):
    arguments = ["--model-path", "m", "--model-type", "llm"]
    with mock.patch.object(serve, "kill_process_tree", lambda *_, **__: None):
        found["serve"] = calls(lambda: serve.serve(None, arguments))
"""

PROCESSES = """
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers import scheduler
with mock.patch.object(Engine, "server_args_class", stop):
    found["Engine"] = calls(lambda: Engine(model_path="m"))
found["launch"] = calls(
    lambda: Engine._launch_subprocesses(None, None, None, None)
)
nothing = [None] * 10
with mock.patch.object(scheduler, "configure_scheduler", stop):
    found["scheduler"] = calls(lambda: scheduler.run_scheduler_process(*nothing))
"""

STATES = """
from sglang_scaling_fixes import plugin
scheduler.configure_scheduler = stop
try:
    scheduler.run_scheduler_process(*nothing)
except BaseException as end:
    found["end"] = type(end).__name__ if isinstance(end, Stop) else str(end)
found["states"] = {s["name"]: s["state"] for s in plugin.statuses()}
found["reasons"] = {s["name"]: s["reason"] for s in plugin.statuses()}
"""

SAY = """
print("found:" + json.dumps(found))
"""
COMMANDS = ("launch_server", "serve --help", "serve")
PLACES = (*COMMANDS, "Engine", "launch", "scheduler")


def test_every_start_and_every_scheduler_calls_the_plugin_and_its_fixes_hold(
    old: Environment, tmp_path: Path
) -> None:
    """One process says it all: an import of SGLang takes a core for ten seconds."""
    target = tree(tmp_path / "patched", "plugin-loader", "index-k-wait", "copies-follow-forwards")
    asked = env(old, target, ",".join(ASKED))
    found = child.said(old.python, LOOK + PROCESSES + STATES + SAY, env=asked, mark="found:")
    assert {place: found[place] for place in PLACES} == dict.fromkeys(PLACES, True)
    assert found["end"] == "Stop", found["reasons"]  # armed, and on to what stock does
    assert found["states"] == {
        "safe-reclaim": "armed",
        "early-send-ordering": "native",
        "hicache-ordering": "native",
        "layer-split": "off",
        "spec-guard": "off",
        "resume": "armed",
    }
    for wait in ("index-K wait", "load fence (Hybrid", "write-back fence (HiCacheController)"):
        assert wait in found["reasons"]["hicache-ordering"]


def test_what_does_not_hold_stops_a_scheduler(old: Environment, tmp_path: Path) -> None:
    """The waits are not patched in, and nothing attaches to the readers of index-K."""
    target = tree(tmp_path / "patched", "plugin-loader")
    asked = env(old, target, "hicache-ordering,spec-guard")
    script = (
        LOOK.partition("sys.argv =")[0]
        + """
from sglang.srt.managers import scheduler
nothing = [None] * 10
"""
    )
    found = child.said(old.python, script + STATES + SAY, env=asked, mark="found:")
    for words in ("not starting: ", "patch apply index-k-wait", "spec-guard: sglang.srt."):
        assert words in found["end"]


def test_without_the_patch_nobody_calls(old: Environment, tmp_path: Path) -> None:
    target = tree(tmp_path / "stock")
    found = child.said(old.python, LOOK + SAY, env=env(old, target, None), mark="found:")
    assert found == dict.fromkeys(COMMANDS, False)


@pytest.mark.parametrize("names", [(), ("plugin-loader",)], ids=["stock", "patched"])
def test_doctor_knows_a_patched_tree(
    names: tuple[str, ...], old: Environment, tmp_path: Path
) -> None:
    """Asked for nothing: whether the plugin is called, by whom, and what the tree has."""
    target = tree(tmp_path / "tree", *names)
    info = target / f"sglang-{RELEASE}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {RELEASE}\n")
    command = [str(old.python), "-m", "sglang_scaling_fixes.cli", "doctor", "--json"]
    asked = {**env(old, target, None), "XDG_CACHE_HOME": str(tmp_path)}
    done = child.finished([*command, "--plugin", "none"], asked)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["sglang"] == RELEASE
    states = {patch["name"]: patch["state"] for patch in found["patches"]}
    assert states == {
        "plugin-loader": "applied" if names else "not applied",
        "index-k-wait": "not applied",
        "copies-follow-forwards": "not applied",
    }
    assert found["plugin"]["loaded"] == bool(names)
    reason = found["plugin"]["reason"]
    if names:
        assert reason == "called by the patch plugin-loader"
    else:
        assert "sglang-scaling-fixes patch apply plugin-loader" in reason
