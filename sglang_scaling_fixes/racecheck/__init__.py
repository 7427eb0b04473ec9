"""Is a build of SGLang ordered? Asked of its own classes, on any CPU.

A check runs in a process of its own, since it replaces `torch.cuda` there. The release is
the installed one, or the source of any stock wheel on the dependencies of this environment.
`fixes="on"` attaches both ordering fixes and `layer-split` as the plugin would; releases that load
no plugins are patched instead, in a copy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_scaling_fixes import child_process
from sglang_scaling_fixes.attach import FIRST_RELEASE
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.lab import wheels
from sglang_scaling_fixes.lab.runtime import STANDINS, cpu_env
from sglang_scaling_fixes.paths import ROOT
from sglang_scaling_fixes.racecheck import patched
from sglang_scaling_fixes.release import sglang_version, version_tuple

RELEASES = (*wheels.OLDER_RELEASES, *wheels.RELEASES)
INSTALLED = "installed"
MARK = "racecheck:"
"""What the worker's one line begins with."""

_WORKER = "sglang_scaling_fixes.racecheck.worker"
_TIMEOUT_S = 600.0
"""Seconds for one release: a cold import of SGLang is slow on a busy machine."""


def check(
    release: str = INSTALLED, fixes: str = "off", hazards: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`{"release", "fixes", "hazards": [{"name", "verdict", "races", ...}]}` of one build.

    `hazards`: only these, by name. Raises `ConfigError` for an unknown release, an
    environment without SGLang, or fixes that cannot be attached.
    """
    if release != INSTALLED and release not in RELEASES:
        raise ConfigError(f"unknown release {release!r}; known: {', '.join(RELEASES)}")
    version = sglang_version() if release == INSTALLED else release
    if version is None:
        raise ConfigError("SGLang is not installed in this environment; pip install sglang")
    if (
        fixes == "on"
        and version_tuple(version) < version_tuple(FIRST_RELEASE)
        and version not in patched.available()
    ):
        raise ConfigError(
            f"sglang {version} loads no plugins, and there are patches only for "
            f"{', '.join(patched.available())}"
        )
    with _source(release, version, fixes) as folder:
        report = _run(folder, fixes, hazards)
    if "error" in report:
        raise ConfigError(f"sglang {version}: {report['error']}")
    if folder is not None and not report["sglang"].startswith(str(folder)):
        raise ConfigError(f"sglang {version} was not loaded from {folder}: {report['sglang']}")
    return {"release": version, "fixes": fixes, **report}


@contextlib.contextmanager
def _source(release: str, version: str, fixes: str) -> Iterator[Path | None]:
    """The folder to import `sglang` from, None for the installed one."""
    folder = None if release == INSTALLED else wheels.source(release)
    if fixes == "on" and version in patched.available():
        with tempfile.TemporaryDirectory() as scratch:
            yield patched.patched(version, folder or _installed(), Path(scratch))
    else:
        yield folder


def _installed() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ConfigError("SGLang is listed in this environment and its files are not there")
    return Path(spec.origin).parents[1]


def _run(folder: Path | None, fixes: str, hazards: tuple[str, ...]) -> dict[str, Any]:
    # No GPU for the worker, even where there is one: its torch.cuda is a stand-in.
    env = cpu_env({"CUDA_VISIBLE_DEVICES": ""})
    env.pop(STANDINS)
    first = [str(folder)] if folder is not None else []
    env["PYTHONPATH"] = os.pathsep.join([*first, str(ROOT), env["PYTHONPATH"]])
    try:
        report: dict[str, Any] = child_process.ask(
            "-m", _WORKER, fixes, *hazards, env=env, mark=MARK, timeout_s=_TIMEOUT_S
        )
    except child_process.NoAnswerInTime as error:
        raise ConfigError(
            f"this SGLang was not checked within {_TIMEOUT_S:.0f} s; try again when this machine "
            "is less busy"
        ) from error
    except child_process.NoAnswer as error:
        raise ConfigError(f"this SGLang cannot be checked: {error}") from error
    return report


def exit_status(report: dict[str, Any]) -> int:
    """0 all ordered, 1 a race, 2 a hazard that could not be played."""
    if any("broken" in hazard for hazard in report["hazards"]):
        return 2
    return int(any(hazard["verdict"] == "race" for hazard in report["hazards"]))


def text(report: dict[str, Any]) -> str:
    """The report for people: one line per hazard, both sides of every race."""
    lines = [f"SGLang {report['release']}, fixes {report['fixes']}", ""]
    width = max(len(hazard["name"]) for hazard in report["hazards"])
    for hazard in report["hazards"]:
        verdict = "RACE" if hazard["verdict"] == "race" else hazard["verdict"]
        about = hazard.get("reason") or hazard.get("broken") or ""
        if hazard["races"]:
            about = f"on {hazard['races']} buffers"
        lines.append(f"{hazard['name']:<{width}}  {verdict:<7}  {about}".rstrip())
    for hazard in report["hazards"]:
        for race in hazard.get("found", ())[:1]:
            lines += ["", f"{hazard['name']}, first of {hazard['races']}: {race['buffer']}"]
            for when in ("earlier", "later"):
                side = race[when]
                stream = f"on stream {side['stream']!r}"
                lines.append(f"  {when}: {side['access']} by {side['operation']} {stream}")
                lines += [f"    {frame}" for frame in side["stack"]]
            lines.append(f"  missing: {race['missing_edge']}")
    return "\n".join(lines)
