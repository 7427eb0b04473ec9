"""Machines to claim to be on: folders that say what `sglang_scaling_fixes.machine` reads.

A test puts `Machine(root, env, version)` in `machine.here`, in its own process or at the top
of a child's script (`CLAIM`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CLAIM = """
from pathlib import Path
from sglang_scaling_fixes import machine

def claim(root, env, wheels):
    machine.here = machine.Machine(Path(root), env, wheels.get)
"""
"""Defines `claim(root, env, wheels)` in a child: from there on it is on that machine."""

_CLASS, _PCI = "sys/class/infiniband", "sys/devices/pci0000:00"


@dataclass(frozen=True)
class Made:
    """What is on a machine, and what is to be said of its RDMA devices."""

    devices: tuple[str, ...] = ()
    """Linked in /sys/class/infiniband as the kernel does."""
    folders: tuple[str, ...] = ("sys/class", "dev")
    files: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    doubt: str = ""
    """A part of it; empty: there is none."""

    def under(self, root: Path) -> Path:
        """`root`, a new folder, with all of it in it."""
        root.mkdir()
        for folder in self.folders:
            (root / folder).mkdir(parents=True)
        for number, name in enumerate(self.devices):
            device = root / _PCI / f"0000:00:0{number}.0/infiniband/{name}"
            device.mkdir(parents=True)
            (root / _CLASS).mkdir(exist_ok=True)
            (root / _CLASS / name).symlink_to(device)
        for file in self.files:
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).touch()
        for link, target in self.links:
            (root / link).parent.mkdir(exist_ok=True)
            (root / link).symlink_to(target)
        return root


MACHINES: Mapping[str, Made] = {
    "no devices": Made(),
    "a driver without devices": Made(folders=("sys/class/infiniband", "dev")),
    "one HCA": Made(devices=("mlx5_0",), files=("dev/infiniband/uverbs0",)),
    "an HCA and no /dev/infiniband": Made(devices=("mlx5_0",)),
    "several HCAs": Made(
        devices=("bnxt_re0", "mlx5_0", "mlx5_1", "mlx5_bond_0"),
        files=tuple(f"dev/infiniband/uverbs{number}" for number in range(4)),
    ),
    "no /sys": Made(folders=("dev",), doubt="/sys/class/infiniband cannot be read: No such file"),
    "no /dev": Made(folders=("sys/class",), doubt="/dev/infiniband cannot be read: No such file"),
    "an unreadable /sys": Made(
        folders=("dev", "sys"),
        links=(("sys/class", "class"),),
        doubt="/sys/class/infiniband cannot",
    ),  # a link to itself: nobody can read it, root neither
    "a file for the class": Made(
        files=("sys/class/infiniband",), doubt="/sys/class/infiniband cannot be read: Not a dir"
    ),
    "the class linked to nowhere": Made(
        links=(("sys/class/infiniband", "gone"),), doubt="/sys/class/infiniband cannot be read"
    ),
    "a file among the devices": Made(
        files=("sys/class/infiniband/version",), doubt="/sys/class/infiniband/version is not a"
    ),
    "a device that is gone": Made(
        links=(("sys/class/infiniband/mlx5_0", "gone"),), doubt="infiniband/mlx5_0 is not a device"
    ),
    "an HCA and a file beside it": Made(
        devices=("mlx5_0",),
        files=("sys/class/infiniband/version",),
        doubt="version is not a device",
    ),
    "device nodes and no class": Made(
        files=("dev/infiniband/uverbs0",), doubt="/dev/infiniband/uverbs0 is there"
    ),
    "other nodes only": Made(files=("dev/infiniband/rdma_cm",)),
}
