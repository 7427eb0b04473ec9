"""What this machine and this process's environment are: the one place that looks.

Whatever else depends on it asks `here`, so that a test can say what there is and run both
ways everywhere: it puts a `Machine` of its own in `here`, over a folder it made (in a child
process too). Nothing that an operator can set does so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from sglang_scaling_fixes.errors import ScalingFixesError

UVERBS = "/dev/infiniband/uverbs"
"""An open RDMA device: the target of its file descriptor, less the number."""


class MachineError(ScalingFixesError):
    """Something that must be looked at cannot be."""


@dataclass(frozen=True)
class Rdma:
    """The RDMA devices of this machine, as far as they can be told.

    Whoever must be right if there are some asks `possible`; whoever must be right if there
    are none asks `devices`. So with a doubt neither is taken for granted.
    """

    devices: tuple[str, ...] = ()
    """Their names in /sys/class/infiniband, sorted. One may still be of no use (a container
    that sees the host's devices, a port that is down)."""
    doubt: str = ""
    """Why there may be others."""

    @property
    def possible(self) -> bool:
        return bool(self.devices or self.doubt)


def installed(distribution: str) -> str | None:
    """The version of a distribution of this Python's environment, None when it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Machine:
    """A machine: its files below `root`, its environment variables, its distributions."""

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    version: Callable[[str], str | None] = installed

    def rdma(self) -> Rdma:
        """Its RDMA devices: the folders in /sys/class/infiniband.

        There are none only if /sys/class can be read and says so, and no /dev/infiniband/uverbs*
        says otherwise. Whatever else is found or cannot be read is a doubt.
        """
        devices, doubts = [], []
        try:
            for name in self._listed("sys/class/infiniband"):
                if (self.root / "sys/class/infiniband" / name).is_dir():
                    devices.append(name)
                else:
                    doubts.append(f"/sys/class/infiniband/{name} is not a device")
        except OSError as error:
            doubts.append(f"/sys/class/infiniband cannot be read: {error.strerror}")
        try:
            nodes = self._listed("dev/infiniband")
        except OSError as error:
            doubts.append(f"/dev/infiniband cannot be read: {error.strerror}")
        else:
            verbs = [name for name in nodes if name.startswith("uverbs")]
            if verbs and not devices:
                doubts.append(f"/dev/infiniband/{verbs[0]} is there")
        return Rdma(tuple(devices), "; ".join(doubts))

    def open_files(self) -> list[tuple[str, str]]:
        """Number and target of every open file of this process. Raises `MachineError`."""
        folder = self.root / "proc/self/fd"
        try:
            numbers = os.listdir(folder)
        except OSError as error:
            raise MachineError(
                f"/proc/self/fd cannot be read ({error.strerror}), so nobody can see what a "
                "transfer engine opens; mount /proc, or start with --plugin none"
            ) from error
        found = []
        for number in numbers:
            try:
                found.append((number, os.readlink(folder / number)))
            except OSError:
                continue  # closed since; the listing itself was such a file
        return found

    def tcp_sockets(self) -> list[list[str]]:
        """The fields of every line of this network's TCP tables, IPv4 and IPv6."""
        found = []
        for table in ("tcp", "tcp6"):  # a kernel without IPv6 has no tcp6
            path = self.root / "proc/self/net" / table
            if path.exists():
                found += [line.split() for line in path.read_text().splitlines()[1:]]
        return found

    def _listed(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing if its own folder can be read and has no such
        name. Raises `OSError` if the one or the other cannot be read."""
        path = self.root / folder
        return sorted(os.listdir(path)) if path.name in os.listdir(path.parent) else []


here = Machine()
