"""A stock SGLang of one release, installed whole for this machine's CPU.

The lab home ($SGLANG_SCALING_FIXES_LAB_HOME, or ~/.cache/sglang-scaling-fixes) holds
one environment per release.  Versions come from lab/constraints/<release>.txt, since
old releases no longer work with today's dependencies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sglang_scaling_fixes import paths
from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab import debian
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.runtime import cpu_env

MOONCAKE = "mooncake-transfer-engine-non-cuda"
_DISTRIBUTION = "sglang-scaling-fixes"
_CONSTRAINTS = Path(__file__).parent / "constraints"
_STAMP = "sglang-scaling-fixes.json"
_NOT_WHOLE = ("0.5.18", "0.5.19", "0.5.20", "0.5.21")
_VERBS = "libibverbs.so.1"
_VERBS_PACKAGES = ("libibverbs1", "librdmacm1", "libnuma1")
_VERBS_NEEDS = ("libnl-3-200", "libnl-route-3-200")


@dataclass(frozen=True)
class Environment:
    """A Python that has one SGLang release, ready to run on this CPU."""

    release: str
    python: Path
    sources: Path  # the installed `sglang` package
    env: Mapping[str, str] = field(default_factory=dict)  # additions its processes need

    def knows_flag(self, field_name: str) -> bool:
        """Whether the release's server arguments have this field."""
        srt = self.sources / "srt"
        files = [srt / "server_args.py", *(srt / "arg_groups").rglob("*.py")]
        return any(field_name in path.read_text(encoding="utf-8") for path in files)

    def models_other_than(self, keep: Sequence[str]) -> list[str]:
        """Model modules of the release, for leaving them out of a server's start-up."""
        modules = (self.sources / "srt" / "models").glob("*.py")
        return sorted(path.stem for path in modules if path.stem not in (*keep, "__init__"))


def lab_home() -> Path:
    """The folder for environments, models and logs of runs."""
    named = os.environ.get("SGLANG_SCALING_FIXES_LAB_HOME")
    return Path(named) if named else Path.home() / ".cache" / "sglang-scaling-fixes"


def releases() -> list[str]:
    """Releases the lab can install."""
    return sorted(path.stem for path in _CONSTRAINTS.glob("*.txt"))


def environment(release: str) -> Environment:
    """The installed environment of `release`; LabError if `install` has not made it."""
    if _running_release() == release:
        return _running_environment(release)
    _constraints(release)
    folder = lab_home() / "envs" / release
    if "package" not in (_read_stamp(folder) or {}):
        raise LabError(
            f"SGLang {release} is not installed for the lab:"
            f" run `sglang-scaling-fixes lab install {release}`"
        )
    return Environment(release, folder / "bin" / "python", _sources(folder), _library_env())


def install(release: str, progress: Progress = print) -> Environment:
    """Install `release` for the lab unless that is done already."""
    if _running_release() == release:
        _ensure_verbs(progress)
        return _running_environment(release)
    constraints = _constraints(release)
    _ensure_verbs(progress)
    folder = lab_home() / "envs" / release
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{release}.lock")):
        _bring_up_to_date(release, constraints, folder, progress)
    return environment(release)


def _bring_up_to_date(release: str, constraints: Path, folder: Path, progress: Progress) -> None:
    digest = hashlib.sha256(constraints.read_bytes()).hexdigest()
    stamp = {"constraints": digest, "package": str(paths.ROOT), "version": _own_version()}
    found = _read_stamp(folder)
    if found == stamp:
        return
    uv = _uv(progress)
    python = folder / "bin" / "python"
    pip = [*uv, "pip", "install", "--quiet", "--python", str(python)]
    if found is None or found.get("constraints") != digest:
        progress(f"installing SGLang {release} into {folder} (about 10 GB, a minute or more)")
        shutil.rmtree(folder, ignore_errors=True)
        _run([*uv, "venv", "--quiet", "--python", _base_python(), str(folder)], "create the venv")
        _run(
            [*pip, "--constraint", str(constraints), f"sglang=={release}", MOONCAKE],
            f"install sglang=={release}",
        )
        _compile(python, progress)
    (folder / _STAMP).write_text(json.dumps({"constraints": digest}))
    _install_ourselves(pip, python)
    (folder / _STAMP).write_text(json.dumps(stamp))
    progress(f"SGLang {release} is ready")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One lab process at a time inside; the lock ends with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _running_release() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _running_environment(release: str) -> Environment:
    if importlib.util.find_spec("mooncake") is None:
        raise LabError(
            f"{sys.executable} has sglang {release} without Mooncake: pip install {MOONCAKE}"
        )
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise LabError(f"{sys.executable} lists sglang {release} and cannot find its files")
    return Environment(
        release, Path(sys.executable), Path(spec.submodule_search_locations[0]), _library_env()
    )


def _constraints(release: str) -> Path:
    path = _CONSTRAINTS / f"{release}.txt"
    if path.is_file():
        return path
    why = (
        " (0.5.18 to 0.5.21 cannot be installed whole: they need cuda-tile, which is only a"
        " placeholder on PyPI)"
        if release in _NOT_WHOLE
        else ""
    )
    raise LabError(f"the lab cannot install SGLang {release}{why}; it can: {', '.join(releases())}")


def _sources(folder: Path) -> Path:
    found = sorted(folder.glob("lib/python3.*/site-packages/sglang"))
    if not found:
        raise LabError(f"{folder} has no sglang: remove that folder and install again")
    return found[0]


def _read_stamp(folder: Path) -> dict[str, str] | None:
    """What the environment was made from; None if it was not finished."""
    try:
        stamp: dict[str, str] = json.loads((folder / _STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp


def _own_version() -> str:
    from sglang_scaling_fixes import __version__

    return __version__


def _base_python() -> str:
    """The constraints were made for 3.11; the same wheels exist for 3.12."""
    major_minor = sys.version_info[:2]
    return sys.executable if major_minor in ((3, 11), (3, 12)) else "3.11"


def _uv(progress: Progress) -> list[str]:
    found = shutil.which("uv")
    if found:
        return [found]
    if importlib.util.find_spec("uv") is None:
        progress("installing uv")
        _run([sys.executable, "-m", "pip", "install", "--quiet", "uv"], "install uv")
    return [sys.executable, "-m", "uv"]


def _install_ourselves(pip: list[str], python: Path) -> None:
    """Editable from a checkout; from a wheel, the same files copied over."""
    if paths.in_checkout():
        _run([*pip, "--no-deps", "--editable", str(paths.ROOT)], "install this package")
        return
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise LabError(f"{_DISTRIBUTION} is not installed in {sys.executable}") from None
    target = _sources(python.parents[1]).parent
    for file in files:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        copy = target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), copy)


def _compile(python: Path, progress: Progress) -> None:
    """Import once what servers import, so that the first cluster does not compile it all."""
    progress("compiling its modules")
    subprocess.run(
        [
            str(python),
            "-c",
            "import sglang.srt.managers.scheduler, sglang.srt.entrypoints.http_server",
        ],
        env=cpu_env(_library_env()),
        capture_output=True,
        check=False,
    )


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise LabError(f"could not {what}: {' '.join(line.strip() for line in lines[-4:])}")


def _verbs_folder() -> Path:
    return lab_home() / "lib"


def _verbs_loads(path: str = _VERBS) -> bool:
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True


def _library_env() -> dict[str, str]:
    """LD_LIBRARY_PATH with the lab's own libibverbs, where the system has none."""
    folder = _verbs_folder()
    if not (folder / _VERBS).exists() or _verbs_loads():
        return {}
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), inherited]))}


def _ensure_verbs(progress: Progress) -> None:
    """Mooncake links libibverbs even where it only speaks TCP."""
    if _verbs_loads() or (_verbs_folder() / _VERBS).exists():
        return
    if shutil.which("apt-get"):
        if os.geteuid() == 0:
            progress(f"installing {', '.join(_VERBS_PACKAGES)} with apt-get")
            for command in (
                ["apt-get", "update", "-qq"],
                ["apt-get", "install", "-y", "-qq", *_VERBS_PACKAGES],
            ):
                subprocess.run(command, capture_output=True, check=False)
            if _verbs_loads():
                return
        _fetch_verbs(progress)
        if (_verbs_folder() / _VERBS).exists():
            return
    raise LabError(
        f"Mooncake needs {_VERBS}: install the package libibverbs1 (Debian, Ubuntu)"
        " or rdma-core (others)"
    )


def _fetch_verbs(progress: Progress) -> None:
    """Unpack the Debian packages into the lab home; needs no root."""
    folder = _verbs_folder()
    progress(f"fetching {', '.join(_VERBS_PACKAGES)} into {folder}")
    debian.unpack((*_VERBS_PACKAGES, *_VERBS_NEEDS), folder / "deb")
    for library in (folder / "deb").rglob("*.so.*"):
        target = folder / library.name
        if not target.exists():
            target.symlink_to(library.resolve())
