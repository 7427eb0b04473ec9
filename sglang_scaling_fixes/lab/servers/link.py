"""The way between the slow prefill and everybody else.

Shaped (root): two network namespaces joined by a veth, a token bucket on the slow
side's egress.  The namespaces have no names: each lives as long as the processes in
it, and the veth with them, so that nothing is left to clean up even after a crash.

Stalled (no root, or no `ip`/`tc`): everybody on the loopback, and the slow prefill's
processes are stopped in the middle of their transfer and continued later.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.servers.process import Supervised
from sglang_scaling_fixes.lab.servers.supervisor import enter_netns

Mode = Literal["shaped", "stalled"]

_NEAR_ADDRESS = "10.99.0.1"
_FAR_ADDRESS = "10.99.0.2"
_PREFIX_BITS = 24
_DEVICE = "ssf0"
_LATENCY = ("latency", "400ms")
_HOLDER_S = 10.0
_PORTS = (20_000, 30_000)


@dataclass(frozen=True)
class Place:
    """Where a server or a client lives: an address, and a network namespace's file if any."""

    address: str
    netns: str | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread inside the namespace: a socket made here stays there."""
        if self.netns is None:
            yield
            return
        home = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        descriptor = os.open(home, os.O_RDONLY)
        try:
            enter_netns(self.netns)
            try:
                yield
            finally:
                enter_netns(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def free_ports(self, count: int) -> list[int]:
        """Distinct TCP ports nobody listens on here at the moment.

        Below the ephemeral range, and with room above: SGLang derives further ports by
        adding up to 10,000.
        """
        with self.entered(), contextlib.ExitStack() as stack:
            ports: list[int] = []
            while len(ports) < count:
                listener = stack.enter_context(socket.socket())
                port = random.randrange(*_PORTS)
                with contextlib.suppress(OSError):
                    listener.bind((self.address, port))
                    ports.append(port)
            return ports


LOCAL = Place("127.0.0.1")


@dataclass(frozen=True)
class Link:
    """Both sides, and a counter of the bytes that went from far to near."""

    mode: Mode
    near: Place  # client, decode server and fast prefill
    far: Place  # slow prefill
    rate_mbit: float | None  # megabits per second, until reshaped; None when stalled
    reason: str  # one line: what was chosen and why
    _counter: tuple[str, str]  # a /proc/.../net/dev file and an interface in it

    def sent_bytes(self) -> int:
        """Bytes sent so far; on a stalled link all loopback traffic counts."""
        path, device = self._counter
        with open(path, encoding="ascii") as file:
            for line in file:
                name, _, fields = line.partition(":")
                if name.strip() == device:
                    return int(fields.split()[8])
        raise LabError(f"{path} has no interface {device}")

    def reshape(self, rate_mbit: float | None) -> None:
        """From now on so many megabits per second; None: as fast as the machine is."""
        if self.far.netns is None:
            raise LabError(f"this link has no rate to change ({self.reason})")
        kind = ["pfifo"] if rate_mbit is None else _bucket(rate_mbit, _LATENCY)
        _queue(self.far.netns, kind)


@contextlib.contextmanager
def link(
    rate_mbit: float, run_dir: Path, *, shaped: bool = True, buffer_bytes: int | None = None
) -> Iterator[Link]:
    """A link of `rate_mbit` megabits per second; a stalled one if not `shaped` or impossible.

    `buffer_bytes`: what the slow side's sockets and the link's queue may take on, for a
    sender that hands over much and dies; by default what the kernel and 400 ms give.
    """
    missing = _missing_for_shaping() if shaped else "asked for"
    if missing:
        yield Link(
            "stalled",
            LOCAL,
            LOCAL,
            None,
            f"SIGSTOP instead of a shaped link: {missing}",
            ("/proc/net/dev", "lo"),
        )
        return
    with contextlib.ExitStack() as stack:
        holders = []
        for side in ("near", "far"):
            holder = Supervised(
                ["sleep", "infinity"],
                log=run_dir / f"namespace-{side}.log",
                supervisor_options=["--new-netns"],
            )
            stack.callback(holder.end)
            holders.append(holder)
        near, far = (_namespace_pid(holder) for holder in holders)
        _connect(near, far, rate_mbit, buffer_bytes)
        yield Link(
            "shaped",
            Place(_NEAR_ADDRESS, f"/proc/{near}/ns/net"),
            Place(_FAR_ADDRESS, f"/proc/{far}/ns/net"),
            rate_mbit,
            f"{rate_mbit:g} Mbit/s by tc tbf between two network namespaces",
            (f"/proc/{far}/net/dev", _DEVICE),
        )


def _missing_for_shaping() -> str | None:
    for tool in ("ip", "tc", "nsenter"):
        if shutil.which(tool) is None:
            return f"no `{tool}` on PATH"
    if os.geteuid() != 0:
        return "not root"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "this container may not create network namespaces"


def _namespace_pid(holder: Supervised) -> int:
    ours = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + _HOLDER_S
    while time.monotonic() < deadline and holder.alive:
        for pid in holder.pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/net") != ours:
                    return pid
        time.sleep(0.02)
    raise LabError(f"no network namespace: {holder.tail(1) or 'its holder did not start'}")


def _connect(near: int, far: int, rate_mbit: float, buffer_bytes: int | None) -> None:
    _run(
        "ip", "link", "add", _DEVICE, "netns", str(near),
        "type", "veth", "peer", "name", _DEVICE, "netns", str(far),
    )  # fmt: skip
    for pid, address in ((near, _NEAR_ADDRESS), (far, _FAR_ADDRESS)):
        inside = ("nsenter", f"--net=/proc/{pid}/ns/net")
        _run(*inside, "ip", "address", "add", f"{address}/{_PREFIX_BITS}", "dev", _DEVICE)
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "link", "set", _DEVICE, "up")
    if buffer_bytes is not None:
        for pid in (near, far):
            for name in ("tcp_wmem", "tcp_rmem"):
                _write_in(pid, f"/proc/sys/net/ipv4/{name}", f"4096 {buffer_bytes} {buffer_bytes}")
    limit = _LATENCY if buffer_bytes is None else ["limit", f"{buffer_bytes}"]
    _queue(f"/proc/{far}/ns/net", _bucket(rate_mbit, limit))


def _bucket(rate_mbit: float, limit: Sequence[str]) -> list[str]:
    return ["tbf", "rate", f"{round(rate_mbit * 1000)}kbit", "burst", "32kbit", *limit]


def _queue(netns: str, kind: Sequence[str]) -> None:
    """What the link's sending side queues with, from now on."""
    _run("nsenter", f"--net={netns}", "tc", "qdisc", "replace", "dev", _DEVICE, "root", *kind)


def _write_in(pid: int, path: str, text: str) -> None:
    """Write a setting of the namespace of process `pid`."""
    _run("nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-c", f"echo '{text}' > {path}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
