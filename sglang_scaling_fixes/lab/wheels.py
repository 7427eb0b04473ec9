"""Stock wheels, downloaded once and kept as source: for reading, and for the race checker.

A release is `<lab home>/wheels/read/<release>`, what `_is_read` names of it. It appears
whole or not at all, so readers need no lock; only who downloads takes one.
As a script: fetch every release, saying so.
"""

from __future__ import annotations

import fcntl
import functools
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import lab_home

OLDER_RELEASES = ("0.5.9", "0.5.10", "0.5.10.post1")
"""Releases without a plugin loader, for which there is a patch set; oldest first."""

RELEASES = (
    "0.5.11",
    "0.5.12",
    "0.5.12.post1",
    "0.5.13",
    "0.5.13.post1",
    "0.5.14",
    "0.5.15",
    "0.5.15.post1",
    "0.5.16",
    "0.5.17",
    "0.5.18",
    "0.5.19",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
)
"""Every stock release with a plugin loader, oldest first."""

_DOWNLOAD = (
    *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"),
    *("--disable-pip-version-check", "--only-binary=:all:"),
    # One build for everyone, whatever this machine is: only the Python source is read.
    *("--python-version=3.11", "--implementation=cp", "--platform=manylinux_2_34_x86_64"),
)


class WheelUnavailable(LabError):
    """A stock wheel is neither cached nor to be had."""


def between(first: str, last: str) -> tuple[str, ...]:
    """The releases from `first` to `last`, both included; also such that load no plugins."""
    every = (*OLDER_RELEASES, *RELEASES)
    return every[every.index(first) : every.index(last) + 1]


def source(release: str) -> Path:
    """The folder with the `sglang` package of a release, fetched if need be."""
    folder = _cache() / "read" / release
    if not folder.is_dir() and (problem := _fetch(release, folder)):
        raise WheelUnavailable(problem)
    return folder


@functools.cache
def _fetch(release: str, folder: Path) -> str | None:
    """Download and unpack; what went wrong, if anything. Tried once per process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (_cache() / f".{release}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return None  # another process was faster
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            done = subprocess.run(
                [*_DOWNLOAD, f"--dest={scratch}", f"sglang=={release}"],
                capture_output=True,
                text=True,
                check=False,
            )
            found = sorted(Path(scratch).glob("*.whl"))
            if done.returncode or len(found) != 1:
                why = (done.stderr or done.stdout).strip().splitlines() or ["no wheel came"]
                return (
                    f"the wheel of sglang {release} is not in {_cache()} and could not be"
                    f" downloaded ({why[-1]}). Run this once with a package index in reach."
                )
            unpacked = Path(scratch) / "src"
            with zipfile.ZipFile(found[0]) as wheel:
                wheel.extractall(unpacked, [n for n in wheel.namelist() if _is_read(n)])
            unpacked.rename(folder)
    return None


def _is_read(name: str) -> bool:
    """Python source, and the kernel sources an import of SGLang looks for.

    Not the diffusion server, which is half of it all.
    """
    if name.startswith("sglang/multimodal_gen/"):
        return False
    return name.endswith(".py") or name.startswith(("sglang/jit_kernel/", "sglang/kernels/"))


def _cache() -> Path:
    return lab_home() / "wheels"


def main() -> int:
    missing = [r for r in RELEASES if not (_cache() / "read" / r).is_dir()]
    if missing:
        print(f"downloading {len(missing)} stock wheels, about 25 MB each", flush=True)
    failed = 0
    with ThreadPoolExecutor(4) as pool:
        futures = {release: pool.submit(source, release) for release in missing}
        for number, (release, future) in enumerate(futures.items(), 1):
            error = future.exception()
            failed += error is not None
            print(f"  {number}/{len(missing)} {release}: {error or 'ok'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
