"""Debian's packages without root: fetched and unpacked into a folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def unpack(packages: Sequence[str], into: Path) -> None:
    """Unpack `packages` below `into`, as far as there is an apt-get, a network, and they exist."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return
    into.mkdir(parents=True, exist_ok=True)
    for package in packages:
        _run(["apt-get", "download", package], into)
    for archive in into.glob("*.deb"):
        _run(["dpkg-deb", "-x", archive.name, "."], into)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
