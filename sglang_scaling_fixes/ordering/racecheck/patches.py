"""Patch sets for releases that load no plugins: `patches/<release>/series` and its files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[3] / "patches"
"""In a checkout; an installed package has no patches and says so."""


def available() -> tuple[str, ...]:
    """Releases with a patch set."""
    return tuple(sorted(series.parent.name for series in FOLDER.glob("*/series")))


def files(release: str) -> list[Path]:
    """The patches of a release, in the order they apply."""
    names = (FOLDER / release / "series").read_text().split()
    return [FOLDER / release / name for name in names]


def patched(release: str, source: Path, scratch: Path) -> Path:
    """A copy of the `sglang` package below `source`, patched; links where nothing changed.

    Raises `ConfigError` if a patch does not apply as it is, without fuzz.
    """
    target = scratch / release
    target.mkdir()
    shutil.copytree(source / "sglang", target / "sglang", copy_function=os.symlink)
    for patch in files(release):
        for name in _changed(patch):
            file = target / name
            stock = file.resolve()
            file.unlink()
            shutil.copyfile(stock, file)
        done = subprocess.run(
            ["patch", "--strip=1", "--fuzz=0", "--quiet", f"--input={patch}"],
            cwd=target,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigError(f"{patch.name} does not apply to sglang {release}: {done.stdout}")
    return target


def _changed(patch: Path) -> list[str]:
    lines = patch.read_text().splitlines()
    return [line.split()[1].removeprefix("b/") for line in lines if line.startswith("+++ ")]
