"""Patch sets for releases that load no plugins: `patches/<release>/series` and its files.

Every patch adds a file of its own that checks, at each import, that the patch is applied rightly.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.paths import ROOT

FOLDER = ROOT / "patches"
"""In a checkout; an installed package has no patches and says so."""

APPLY = ("git", "apply", "--unidiff-zero")
"""Applies what it reads from stdin, all of it or nothing, in the folder that holds `sglang`.

Without the option, git puts lines that have no context at the end of a file.
"""


def available() -> tuple[str, ...]:
    """Releases with a patch set."""
    return tuple(sorted(series.parent.name for series in FOLDER.glob("*/series")))


def state(release: str, source: Path) -> list[dict[str, str]]:
    """`[{"name", "state"}]` of every patch that the package `sglang` below `source` has or lacks.

    A patch that is applied says so itself: its file of checks is there, and names the files that
    it changes with their digests. What a checkout has for the release and the tree has not is
    `not applied`.
    """
    found = {}
    for file in (source / "sglang" / "srt").glob("*/__init__.py"):
        text = file.read_text()
        if "of sglang-scaling-fixes is applied rightly" not in text:
            continue
        told = _constants(text)
        right = all(
            _digest(file.parent / name) == digest for name, digest in told["_FILES"].items()
        )
        found[told["_PATCH"]] = "applied" if right else "applied wrongly, SGLang cannot be imported"
    if release in available():
        for file in files(release):
            found.setdefault(file.name, "not applied")
    return [{"name": name, "state": found[name]} for name in sorted(found)]


def _constants(text: str) -> dict[str, Any]:
    """The literals that a module assigns at its top."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant | ast.Dict)
    }


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def files(release: str) -> list[Path]:
    """The patches of a release, in the order they apply."""
    names = (FOLDER / release / "series").read_text().split()
    return [FOLDER / release / name for name in names]


def patched(release: str, source: Path, scratch: Path) -> Path:
    """A copy of the `sglang` package below `source`, patched; links where nothing changed.

    Raises `ConfigError` if the series does not apply.
    """
    series = "".join(patch.read_text() for patch in files(release))
    target = copied(source, scratch / release, changed(series))
    try:
        done = subprocess.run(
            APPLY, cwd=target, input=series, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError("patches are applied with git, which is not installed here") from error
    if done.returncode:
        why = "; ".join(done.stderr.splitlines())
        raise ConfigError(f"the patches for sglang {release} do not apply to {source}: {why}")
    return target


def copied(source: Path, target: Path, own: set[str]) -> Path:
    """The `sglang` package below `source` as links in `target`, the files of `own` as copies."""
    shutil.copytree(source / "sglang", target / "sglang", copy_function=os.symlink)
    for name in own:
        file = target / name
        if file.exists():  # a patch may add it
            stock = file.resolve()
            file.unlink()
            shutil.copyfile(stock, file)
    return target


def changed(series: str) -> set[str]:
    """The files that patches change or add, relative to the folder that holds `sglang`."""
    lines = series.splitlines()
    return {line.split()[1].removeprefix("b/") for line in lines if line.startswith("+++ ")}
