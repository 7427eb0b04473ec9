"""What was proven before is believed for the same files and environment, and for nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes import child_process, loading, loading_probe, machine, proof_store
from sglang_scaling_fixes.machine import Machine
from sglang_scaling_fixes.paths import PACKAGE, ROOT
from tests.machines import MACHINES

SOUND = {
    "sglang": "0.5.23",
    "loader": True,
    "called": True,
    "refused": None,
    "error": None,
    "statuses": [
        {"name": "safe-reclaim", "state": "armed", "reason": "proven"},
        {"name": "layer-split", "state": "off", "reason": "not asked for"},
    ],
}
HERE: dict[str, Any] = {
    "ours": ["scaling_fixes"],
    "others": {},
    "copies": [{"version": "1.0", "folder": "somewhere"}],
    "folder": str(PACKAGE),
    "error": None,
    "sglang": "/somewhere/sglang",
    "loader": True,
    "patched": False,
    "calls": True,
    "state": "one",
}


class Children:
    """The two processes that are asked: their answers, and which were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.answers: dict[str, dict[str, Any]] = {"installed": dict(HERE), "load": dict(SOUND)}
        self.started: list[str] = []
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(child_process, "ask", self._ask)

    def _ask(self, *arguments: str, env: Mapping[str, str], **_: Any) -> Any:
        self.started.append(arguments[-1])
        return self.answers[arguments[-1]]

    def proves(self, env: Mapping[str, str] | None = None, *, again: bool = False) -> bool:
        """Whether the classes of the release are imported for this question."""
        self.started.clear()
        loading.ask(env or {"A": "1"}, again=again)
        assert self.started[0] == "installed"
        return "load" in self.started


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Children:
    return Children(monkeypatch, tmp_path)


def test_the_same_is_proven_once(children: Children) -> None:
    assert children.proves()
    assert not children.proves()
    found = loading.ask({"A": "1"})
    assert found.problem is None and found.statuses == SOUND["statuses"]
    assert found.proof is not None and found.proof.kept
    assert not children.proves({"A": "1", "PWD": "/elsewhere"})  # nobody reads that


def test_other_files_or_another_environment_are_proven_anew(children: Children) -> None:
    assert children.proves()
    assert children.proves({"A": "2"})
    children.answers["installed"]["state"] = "two"
    assert children.proves()
    assert children.proves(again=True)
    assert not children.proves()


def test_another_machine_is_proven_anew(
    children: Children, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Containers of one host may share this user's files, and not have the same devices."""
    for name in ("no devices", "one HCA"):
        root = MACHINES[name].under(tmp_path / name)
        env = {"XDG_CACHE_HOME": str(tmp_path)}
        monkeypatch.setattr(machine, "here", Machine(root, env, lambda _: None))
        assert children.proves()
        assert not children.proves()


@pytest.mark.parametrize(
    "trouble",
    [
        {"called": False},
        {"refused": "it ended"},
        {"error": "it broke"},
        {"statuses": [{"name": "safe-reclaim", "state": "unsupported", "reason": "hooked"}]},
    ],
)
def test_trouble_is_never_kept(children: Children, trouble: dict[str, Any]) -> None:
    children.answers["load"] |= trouble
    assert children.proves() and children.proves()


@pytest.mark.parametrize("change", [{"calls": False}, {"loader": False, "calls": None}])
def test_a_proof_does_not_help_where_the_loader_does_not_call(
    children: Children, change: dict[str, Any]
) -> None:
    assert children.proves()
    children.answers["installed"] |= change
    assert not children.proves()
    assert loading.ask({"A": "1"}).problem is not None


def test_a_file_that_cannot_be_read_is_no_proof(children: Children) -> None:
    assert children.proves()
    (kept,) = proof_store.folder().iterdir()
    kept.write_text("{")
    assert children.proves() and not children.proves()


def test_where_nothing_can_be_kept_it_is_proven_each_time(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert children.proves() and children.proves()


def test_the_oldest_proofs_go(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_store, "_KEPT", 3)
    for number in range(5):
        assert children.proves({"A": str(number)})
    assert len(list(proof_store.folder().iterdir())) == 3
    assert not children.proves({"A": "4"})
    assert children.proves({"A": "0"})


def tree(folder: Path) -> None:
    """As much of SGLang as its loader, ours and another plugin that fails."""
    for name, text in {
        "sglang/__init__.py": "raise RuntimeError('all of it is imported')",
        "sglang/srt/__init__.py": "",
        "sglang/srt/plugins/__init__.py": LOADER,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    info = folder / "ours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: ours\nVersion: 1.0\n")
    point = "scaling_fixes = sglang_scaling_fixes.entry:activate"
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{point}\n")


LOADER = """
import os
from importlib.metadata import entry_points

class HookRegistry:
    apply_hooks = None

def load_plugins():
    for entry in entry_points(group="sglang.srt.plugins"):
        if entry.name == "scaling_fixes" != os.environ.get("LEAVE_OUT"):
            entry.load()()
    HookRegistry.apply_hooks()
"""

ASK = """
import json, runpy, sys
probe = runpy.run_path(sys.argv[1])
found = probe["installed"]()
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
print(json.dumps({**found, "heavy": sorted(heavy)}))
"""


def test_our_patch_asks_no_entry_point_and_needs_the_package(children: Children) -> None:
    children.answers["installed"] |= {"patched": True, "ours": []}
    found = loading.ask({"A": "1"})
    assert found.problem is None
    assert found.as_dict()["reason"] == "called by the patch plugin-loader"
    children.answers["installed"] |= {"calls": False, "folder": None}
    found = loading.ask({"A": "1"})
    assert "has the patch plugin-loader" in str(found.problem)
    assert "pip install it there" in str(found.problem)


def installed(folder: Path, **env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK, loading_probe.__file__],
        env={"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_whom_the_loader_calls_is_found_out_without_the_rest_of_sglang(tmp_path: Path) -> None:
    tree(tmp_path)
    found = installed(tmp_path)
    assert (found["loader"], found["calls"]) == (True, True)
    assert found["heavy"] == []
    assert installed(tmp_path, LEAVE_OUT="scaling_fixes")["calls"] is False


def test_our_patch_is_a_loader(tmp_path: Path) -> None:
    """Its sentinel says so; what it checks is not looked at here."""
    tree(tmp_path)
    shutil.rmtree(tmp_path / "sglang/srt/plugins")
    assert installed(tmp_path)["loader"] is False
    (tmp_path / "sglang/srt/__init__.py").write_text('_NAME = "plugin-loader"\n')
    found = installed(tmp_path)
    assert (found["patched"], found["loader"], found["calls"]) == (True, True, True)
    assert Path(found["folder"]) == PACKAGE


def test_a_plugin_that_fails_leaves_it_open_whom_the_loader_calls(tmp_path: Path) -> None:
    tree(tmp_path)
    loader = tmp_path / "sglang/srt/plugins/__init__.py"
    loader.write_text(loader.read_text() + "    raise SystemExit('another plugin')\n")
    assert installed(tmp_path)["calls"] is None


def test_any_change_of_the_files_is_another_state(tmp_path: Path) -> None:
    tree(tmp_path)
    states = [installed(tmp_path)["state"]]
    assert installed(tmp_path)["state"] == states[0]
    (tmp_path / "sglang/srt/new.py").write_text("")
    states.append(installed(tmp_path)["state"])
    (tmp_path / "sglang/srt/new.py").write_text("x")
    states.append(installed(tmp_path)["state"])
    (tmp_path / "torch-9.0.dist-info").mkdir()
    states.append(installed(tmp_path)["state"])
    assert len(set(states)) == 4
