"""Runs a command where the machine has RDMA devices, as far as the file system says.

    python -I devices.py NAME[,NAME...] -- COMMAND...

In a mount namespace of its own, each device has its folder below /sys/class/infiniband and its
file below /dev/infiniband. Both are seen by the command and its children only, and are gone with
them. Without root a user namespace is made first. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PCI_ADDRESS = "0000:5f:{:02x}.0"

_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> None:
    names, separator, *command = arguments
    if separator != "--" or not command:
        raise SystemExit("devices.py NAME[,NAME...] -- COMMAND...")
    try:
        _own_namespace()
        _show(names.split(","))
    except OSError as error:
        raise SystemExit(f"no namespace with RDMA devices in it: {error}") from error
    os.execvp(command[0], command)


def _own_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        _call("unshare", CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _call("unshare", CLONE_NEWNS)
    _mount(None, "/", MS_REC | MS_PRIVATE)


def _show(names: list[str]) -> None:
    classes, files = _covered("/sys/class"), _covered("/dev")
    for number, name in enumerate(names):
        # As in a real /sys: two above a device's folder is the PCI device's.
        pci = classes / "pci-of-infiniband" / PCI_ADDRESS.format(number)
        device = pci / "infiniband" / name
        (device / "ports/1/gid_attrs/ndevs").mkdir(parents=True)
        (pci / "numa_node").write_text("-1\n")
        (classes / "infiniband").mkdir(exist_ok=True)
        (classes / "infiniband" / name).symlink_to(os.path.relpath(device, classes / "infiniband"))
        (files / "infiniband").mkdir(exist_ok=True)
        verbs = files / "infiniband" / f"uverbs{number}"
        verbs.touch()
        _mount("/dev/null", str(verbs), MS_BIND)


def _covered(folder: str) -> Path:
    """`folder` as it was, under a file system to which entries can be added."""
    before = os.open(folder, os.O_RDONLY)
    entries = list(os.scandir(before))
    _mount("tmpfs", folder, 0, "tmpfs")
    for entry in entries:
        source, target = f"/proc/self/fd/{before}/{entry.name}", Path(folder, entry.name)
        if entry.is_symlink():
            target.symlink_to(os.readlink(source))
            continue
        if entry.is_dir(follow_symlinks=False):
            target.mkdir()
        else:
            target.touch()
        _mount(source, str(target), MS_BIND | MS_REC)
    os.close(before)
    return Path(folder)


def _mount(source: str | None, target: str, flags: int, kind: str | None = None) -> None:
    _call("mount", source and source.encode(), target.encode(), kind and kind.encode(), flags, None)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])
