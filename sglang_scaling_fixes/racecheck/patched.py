"""A patched copy of a release that loads no plugins, with the patch set's waits in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sglang_scaling_fixes.patches import change, manifest


def available() -> tuple[str, ...]:
    """Releases with a patch set."""
    return manifest.load().releases()


def waits(release: str) -> list[str]:
    """The patches that order something. The plugin's loader is left out: no server is started."""
    return [patch.name for patch in manifest.load().series(release) if patch.kind == "backport"]


def patched(release: str, source: Path, scratch: Path) -> Path:
    """A copy of the `sglang` package below `source`, patched; links where nothing changed.

    Raises `ScalingFixesError` if its files are not that release's.
    """
    known = manifest.load()
    target = copied(source, scratch / release, known.files(release))
    change.apply(known, target, waits(release))
    return target


def copied(source: Path, target: Path, own: Iterable[str]) -> Path:
    """The `sglang` package below `source` as links in `target`, the files of `own` as copies."""
    shutil.copytree(source / "sglang", target / "sglang", copy_function=os.symlink)
    for name in own:
        stock = (target / name).resolve()
        (target / name).unlink()
        shutil.copyfile(stock, target / name)
    return target
