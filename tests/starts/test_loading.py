"""Every way in which stock does not load the plugin: what doctor says, and what a server does.

The loader is the wheels' own code. Around it stands as much of SGLang as a start needs that is
over in a second; nothing can be armed in that, so "loaded" and "not loaded" are the verdicts here.
The last tests ask whole releases.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sglang_scaling_fixes
from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.flags import FILTER_ENV
from sglang_scaling_fixes.lab import wheels
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from tests import child
from tests.releases import NEW, OLD

PACKAGE = Path(sglang_scaling_fixes.__file__).parent
ENTRY_POINTS = "[sglang.srt.plugins]\nscaling_fixes = sglang_scaling_fixes.entry:activate\n"

SERVER_ARGS = """
class ServerArgs:
    @staticmethod
    def add_cli_args(parser): pass
    @classmethod
    def from_cli_args(cls, args): return "stock's arguments"
"""
# What launch_server does before it starts anything.
SERVER = """
import argparse, json
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print("server:" + json.dumps(ServerArgs.from_cli_args(parser.parse_args([]))))
"""


@dataclass(frozen=True)
class Place:
    """A bare Python with a stock loader beside it, and a folder to install the plugin into."""

    python: Path
    stock: Path
    plugin: Path

    def env(self, **more: str) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if n not in (FILTER_ENV, PLUGIN_ENV)}
        path = os.pathsep.join([str(self.plugin), str(self.stock)])
        return {**kept, "PYTHONPATH": path, **more}

    def doctor(self, *argv: str, **more: str) -> tuple[int, dict[str, Any]]:
        done = child.finished(
            [str(self.python), "-P", "-m", "sglang_scaling_fixes.cli", "doctor", "--json", *argv],
            self.env(**more),
        )
        assert done.stdout, done.stderr[-2000:]
        return done.returncode, json.loads(done.stdout)

    def server(self, **more: str) -> subprocess.CompletedProcess[str]:
        """A start that asks for the plugin by environment."""
        return child.finished(
            [str(self.python), "-P", "-c", SERVER], self.env(**{PLUGIN_ENV: "default", **more})
        )


def distribution(folder: Path, name: str, version: str, entry_points: str | None = None) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points is not None:
        (info / "entry_points.txt").write_text(entry_points)


def stock(folder: Path, release: str) -> Path:
    """The release's own loader, and nothing else of it."""
    srt = folder / "sglang" / "srt"
    srt.mkdir(parents=True)
    (folder / "sglang" / "__init__.py").write_text(f"__version__ = {release!r}\n")
    (srt / "__init__.py").touch()
    (srt / "server_args.py").write_text(SERVER_ARGS)
    source = wheels.source(release) / "sglang" / "srt"
    for name in ("plugins", "environ.py", "debug_utils"):
        if (source / name).exists():
            (srt / name).symlink_to(source / name)
    distribution(folder, "sglang", release)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package: what is found is what a test has put there."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def place(bare: Path, tmp_path: Path, release: str) -> Place:
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    return Place(bare, stock(tmp_path / "stock", release), plugin)


Arrange = Callable[[Place], dict[str, str]]
"""Installs the plugin, in one way or another; returns variables of the environment."""


def copy_code(folder: Path, entry: str | None = None) -> None:
    target = folder / PACKAGE.name
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    if entry is not None:
        (target / "entry.py").write_text(entry)


def installed(place: Place) -> dict[str, str]:
    (place.plugin / PACKAGE.name).symlink_to(PACKAGE)
    distribution(place.plugin, "sglang-scaling-fixes", "1.0", ENTRY_POINTS)
    return {}


def named_in_the_filter(place: Place) -> dict[str, str]:
    return {**installed(place), FILTER_ENV: "other, scaling_fixes"}


def twice(place: Place) -> dict[str, str]:
    distribution(place.stock, "sglang-scaling-fixes", "0.9", ENTRY_POINTS)
    return installed(place)


def others_named(place: Place) -> dict[str, str]:
    return {**installed(place), FILTER_ENV: "other"}


def nobody_named(place: Place) -> dict[str, str]:
    return {**installed(place), FILTER_ENV: ","}


def only_on_the_path(place: Place) -> dict[str, str]:
    (place.plugin / PACKAGE.name).symlink_to(PACKAGE)
    return {}


def without_entry(place: Place) -> dict[str, str]:
    (place.plugin / PACKAGE.name).symlink_to(PACKAGE)
    distribution(place.plugin, "sglang-scaling-fixes", "1.0")
    return {}


def shadowed_by_one_without_entry(place: Place) -> dict[str, str]:
    distribution(place.plugin, "sglang-scaling-fixes", "0.1")
    (place.stock / PACKAGE.name).symlink_to(PACKAGE)
    distribution(place.stock, "sglang-scaling-fixes", "1.0", ENTRY_POINTS)
    return {}


def moved(place: Place) -> dict[str, str]:
    (place.plugin / PACKAGE.name).symlink_to(PACKAGE)
    points = ENTRY_POINTS.replace("entry:", "gone:")
    distribution(place.plugin, "sglang-scaling-fixes", "1.0", points)
    return {}


def broken(place: Place) -> dict[str, str]:
    copy_code(place.plugin, "import no_such_module\n")
    distribution(place.plugin, "sglang-scaling-fixes", "1.0", ENTRY_POINTS)
    return {}


def raises(place: Place) -> dict[str, str]:
    copy_code(place.plugin, "def activate():\n    raise RuntimeError('it broke')\n")
    distribution(place.plugin, "sglang-scaling-fixes", "1.0", ENTRY_POINTS)
    return {}


def does_nothing(place: Place) -> dict[str, str]:
    copy_code(place.plugin, "def activate():\n    pass\n")
    distribution(place.plugin, "sglang-scaling-fixes", "1.0", ENTRY_POINTS)
    return {}


def name_is_taken(place: Place) -> dict[str, str]:
    (place.stock / "theirs.py").write_text("def activate():\n    pass\n")
    points = "[sglang.srt.plugins]\nscaling_fixes = theirs:activate\n"
    distribution(place.stock, "theirs", "2.0", points)
    return installed(place)


@pytest.mark.parametrize("release", [OLD, NEW])
@pytest.mark.parametrize("arrange", [installed, named_in_the_filter, twice])
def test_what_stock_loads_doctor_calls_loaded(place: Place, arrange: Arrange) -> None:
    """The control of all that follows."""
    env = arrange(place)
    status, found = place.doctor("--plugin", "none", **env)
    assert found["plugin"]["loaded"], found["plugin"]["reason"]
    assert status == 0
    assert Path(found["plugin"]["folder"]).resolve() == PACKAGE
    assert len(found["plugin"]["copies"]) == (2 if arrange is twice else 1)
    started = place.server(**env)
    assert started.returncode == 1
    assert started.stderr.strip().splitlines()[-1].startswith("sglang-scaling-fixes: ")
    # What makes that server end is what doctor gives as the reason.
    status, found = place.doctor("--plugin", "safe-reclaim", **env)
    assert status == 1
    states = {fix["name"]: fix for fix in found["fixes"]}
    assert states["safe-reclaim"]["state"] == "unsupported"
    assert "cannot be imported" in states["safe-reclaim"]["reason"]


@pytest.mark.parametrize("release", [OLD, NEW])
@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (others_named, ["SGLANG_PLUGINS=other", "add scaling_fixes", "unset"]),
        (nobody_named, ["SGLANG_PLUGINS=,", "add scaling_fixes"]),
        (only_on_the_path, ["not installed", "PYTHONPATH", "pip install"]),
        (without_entry, ["1.0", "without its entry point", "install it anew"]),
        (shadowed_by_one_without_entry, ["0.1", "without its entry point"]),
        (moved, ["cannot be imported", "sglang_scaling_fixes.gone", "install it anew"]),
        (broken, ["cannot be imported", "no_such_module", "install it anew"]),
        (raises, ["it broke", "goes on without"]),
        (does_nothing, ["did not call"]),
        (name_is_taken, ["theirs", "scaling_fixes", "uninstall"]),
    ],
)
def test_what_stock_does_not_load_doctor_does_not_call_armed(
    place: Place, arrange: Arrange, words: list[str]
) -> None:
    env = arrange(place)
    status, found = place.doctor("--plugin", "safe-reclaim", **env)
    assert status == 1
    assert not found["plugin"]["loaded"]
    for word in words:
        assert word in found["plugin"]["reason"]
    assert {fix["state"] for fix in found["fixes"]} == {"unsupported"}
    assert {fix["reason"] for fix in found["fixes"]} == {found["plugin"]["reason"]}
    # And so it is: the variable alone asks in vain.
    started = place.server(**env)
    assert started.returncode == 0, started.stderr
    assert "stock's arguments" in started.stdout


@pytest.mark.parametrize("release", [NEW])
def test_the_copy_that_stock_loads_must_be_the_one_that_asks(
    place: Place, tmp_path: Path, bare: Path
) -> None:
    copy_code(place.plugin)
    distribution(place.plugin, "sglang-scaling-fixes", "1.0", ENTRY_POINTS)
    script = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "from sglang_scaling_fixes.cli import main\n"
        "sys.exit(main(['doctor', '--json', '--plugin', 'safe-reclaim']))"
    )
    done = child.finished([str(bare), "-P", "-c", script], place.env())
    found = json.loads(done.stdout)
    assert done.returncode == 1
    for word in (str(place.plugin / PACKAGE.name), str(PACKAGE), "uninstall one"):
        assert word in found["plugin"]["reason"]


@pytest.mark.parametrize("release", [NEW])
def test_a_loader_that_moved_is_named(place: Place) -> None:
    """A release after the ones that are known."""
    installed(place)
    srt = place.stock / "sglang" / "srt"
    (srt / "plugins").unlink()
    status, found = place.doctor("--plugin", "safe-reclaim")
    assert status == 1
    for word in (f"SGLang {NEW}", "sglang.srt.plugins.load_plugins"):
        assert word in found["plugin"]["reason"]


# -- whole releases ------------------------------------------------------------------


def without_loader(old: Environment, release: str, folder: Path) -> dict[str, str]:
    """The environment in which the oldest lab release's Python has another release."""
    distribution(folder, "sglang", release)
    path = [str(folder), str(wheels.source(release)), str(PACKAGE.parent)]
    kept = {n: v for n, v in os.environ.items() if n != FILTER_ENV}
    return {
        **kept,
        **old.env,
        "PYTHONPATH": os.pathsep.join(path),
        "MC_FORCE_TCP": "1",
        PLUGIN_ENV: "safe-reclaim",
    }


@pytest.mark.parametrize("release", wheels.OLDER_RELEASES)
def test_a_release_without_a_loader_is_never_armed(
    old: Environment, tmp_path: Path, release: str
) -> None:
    """Its classes would let themselves be attached to; nobody does."""
    done = child.finished(
        [str(old.python), "-P", "-m", "sglang_scaling_fixes.cli", "doctor", "--json"],
        without_loader(old, release, tmp_path),
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["sglang"] == release
    assert {fix["state"] for fix in found["fixes"]} == {"unsupported"}
    for word in (f"SGLang {release} has no plugin loader", "0.5.11", "patch", PLUGIN_ENV):
        assert word in found["plugin"]["reason"]


def test_a_release_without_a_loader_does_not_know_the_flag(
    old: Environment, tmp_path: Path
) -> None:
    env = without_loader(old, wheels.OLDER_RELEASES[-1], tmp_path)
    standins = cpu_env({})["PYTHONPATH"].split(os.pathsep)[0]
    env["PYTHONPATH"] = os.pathsep.join([standins, env["PYTHONPATH"]])
    done = child.finished(
        [str(old.python), "-m", "sglang.launch_server", "--model-path", "none", "--plugin"],
        cpu_env(env),
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --plugin" in done.stderr


@pytest.mark.parametrize("release", ["old", "new"])
def test_a_whole_release_that_leaves_us_out(release: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(release)
    done = child.finished(
        [str(environment.python), "-P", "-m", "sglang_scaling_fixes.cli", "doctor", "--json"],
        cpu_env({**environment.env, FILTER_ENV: "other"}),
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert {fix["state"] for fix in found["fixes"]} == {"unsupported"}
    assert "SGLANG_PLUGINS=other" in found["plugin"]["reason"]
