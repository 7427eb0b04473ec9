"""Debian's packages without root: fetched and unpacked into a folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def unpack(packages: Sequence[str], into: Path) -> bool:
    """Unpack `packages` below `into`; whether all of them are there now.

    False too where there is no apt-get, or no network.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return False
    into.mkdir(parents=True, exist_ok=True)
    for package in packages:
        _run(["apt-get", "download", package], into)
    archives = list(into.glob("*.deb"))
    for archive in archives:
        _run(["dpkg-deb", "-x", archive.name, "."], into)
    return len(archives) >= len(packages)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
