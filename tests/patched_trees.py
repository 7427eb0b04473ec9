"""Small trees for the tests of patches: of a release, only the files that a series changes."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_scaling_fixes.patches import manifest
from tests.contract.wheels import source

KNOWN = manifest.load()
FILES = sorted({file for release in KNOWN.releases() for file in KNOWN.files(release)})
"""What any series changes, relative to the folder that holds `sglang`."""


def changed(release: str) -> tuple[list[str], list[str]]:
    """The files of stock's that the series of the release changes, and its sentinels."""
    series = KNOWN.series(release)
    return sorted(KNOWN.files(release)), sorted(p.sentinel for p in series)


SENTINELS = sorted({patch.sentinel for patch in KNOWN.patches if patch.sentinel})


def small(release: str, folder: Path, layout: str = "") -> Path:
    """`folder`, with the release's files below `sglang/`, or below `LAYOUT/sglang/`."""
    for name in FILES:
        stock = source(release) / name
        target = folder / layout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if stock.exists():
            shutil.copyfile(stock, target)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below it, whatever it is; bytecode, which Python renews, left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
