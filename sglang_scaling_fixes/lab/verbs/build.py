"""Compiles verbs in software on this machine, and says what is missing where it cannot."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab import debian
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import lab_home
from sglang_scaling_fixes.lab.verbs import NIC, Transport

SOURCE = Path(__file__).parent / "source"
DEVICES = Path(__file__).parent / "devices.py"
SYSTEM_DEVICES = Path("/sys/class/infiniband")
LIBRARY = "libibverbs.so.1"
HEADERS = "libibverbs-dev"

NIC_SOURCES = ("softnic.c", "links.c", "listeners.c", "packets.c", "pairs.c", "memory.c")
_LIBRARY_SOURCES = ("libibverbs.c", "queues.c", "orders.c")
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
_OTHERWISE = "or use --transport tcp"


def build(progress: Progress = print) -> Path:
    """The folder of the library and its NIC, compiled if that is not done yet.

    LabError beside a real RDMA device, without namespaces, a C compiler, or the headers of
    libibverbs. Nothing is left half done: the folder appears when it is whole.
    """
    if (problem := obstacle()) is not None:
        raise LabError(problem)
    folder = lab_home() / "verbs" / _digest()
    if folder.exists():
        return folder
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LabError(f"RDMA in software is compiled here: install a C compiler, {_OTHERWISE}")
    include = headers(compiler, progress)
    progress(f"compiling RDMA verbs in software into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "made"
        made.mkdir()
        compile_c(compiler, [SOURCE / name for name in NIC_SOURCES], made / NIC)
        compile_c(
            compiler,
            [SOURCE / name for name in _LIBRARY_SOURCES],
            made / LIBRARY,
            *include,
            *("-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"),
            f"-Wl,--version-script={SOURCE / 'libibverbs.map'}",
        )
        try:
            made.rename(folder)
        except OSError:  # somebody else was faster
            if not folder.exists():
                raise
    return folder


def prepare(transport: Transport, progress: Progress) -> None:
    """Before anything is started: what servers with this transport will need. Raises LabError."""
    if transport == "rdma":
        build(progress)


def obstacle() -> str | None:
    """Why this machine cannot have devices in software; None if it can."""
    found = sorted(path.name for path in SYSTEM_DEVICES.glob("*"))
    if found:
        return (
            f"this machine has RDMA devices ({', '.join(found)}), and beside those the lab pretends"
            " nothing: use --transport tcp"
        )
    probe = subprocess.run(
        _with_devices(["rdma0"], ["true"]), capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        return f"{probe.stderr.strip()}: allow mount namespaces, {_OTHERWISE}"
    return None


def compile_c(compiler: str, sources: list[Path], target: Path, *flags: str) -> None:
    """Compile `sources` into `target`. LabError with the compiler's first words."""
    command = [compiler, *_FLAGS, "-o", str(target), *map(str, sources), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()[:40])
        raise LabError(f"could not compile RDMA verbs in software ({said}), {_OTHERWISE}")


def over_rdma(
    command: Sequence[str], env: Mapping[str, str], devices: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """`command` and its environment where it has these devices (IPv4 addresses by name).

    Mooncake then writes with them. Raises as `build` does.
    """
    folder = build(progress=lambda _: None)
    inherited = {name: value for name, value in env.items() if name != "MC_FORCE_TCP"}
    libraries = filter(None, [str(folder), env.get("LD_LIBRARY_PATH")])
    additions = {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "SOFTVERBS_DEVICES": ",".join(f"{name}={address}" for name, address in devices.items()),
        "MOONCAKE_PROTOCOL": "rdma",
    }
    return _with_devices(devices, command), {**inherited, **additions}


def _with_devices(names: Iterable[str], command: Sequence[str]) -> list[str]:
    """`command` where /sys and /dev show RDMA devices of these names."""
    return [sys.executable, "-I", str(DEVICES), ",".join(names), "--", *command]


def _digest() -> str:
    digest = hashlib.sha256(f"{platform.machine()} {_FLAGS}".encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def headers(compiler: str, progress: Progress) -> list[str]:
    """Flags with which infiniband/verbs.h is found."""
    folder = lab_home() / "verbs" / "headers"
    include = [f"-I{folder / 'usr' / 'include'}"]
    if _compiles(compiler, []):
        return []
    if not _compiles(compiler, include):
        progress(f"fetching {HEADERS} into {folder}")
        debian.unpack([HEADERS], folder)
    if not _compiles(compiler, include):
        raise LabError(
            "RDMA in software needs infiniband/verbs.h of rdma-core 32 or later: install"
            f" libibverbs-dev (Debian, Ubuntu) or rdma-core-devel (others), {_OTHERWISE}"
        )
    return include


def _compiles(compiler: str, flags: list[str]) -> bool:
    return (
        subprocess.run(
            [compiler, "-fsyntax-only", "-xc", "-", *flags],
            input="#include <infiniband/verbs.h>\nstruct ibv_gid_entry needed;\n",
            text=True,
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
