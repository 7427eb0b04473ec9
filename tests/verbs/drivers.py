"""Two processes that use the verbs in software: compiled here, driven by lines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_scaling_fixes.lab.verbs import NIC, build

SIZE = 1 << 20
PACKET = 16 << 10
LOCAL, REMOTE_WRITE, ALL = 1, 2, 7
SUCCESS, LENGTH, PROTECTION, FLUSHED, INVALID, ACCESS, RETRIES = 0, 1, 4, 5, 9, 10, 12
RESET, RTS, ERROR = 0, 3, 6
CQ_EVENT, ACCESS_EVENT, NO_EVENT = 0, 3, -1
PATIENCE_MS = 1500
HERE, THERE = "127.0.0.1", "127.0.0.2"


@dataclass(frozen=True)
class Verbs:
    """A compiled library with its NIC, and a driver."""

    folder: Path

    @classmethod
    def compiled(cls, into: Path, changed: Sequence[tuple[str, str, str]] = ()) -> Verbs:
        """As shipped, or with (file, text, other text) replaced in a copy of the sources."""
        shipped = build.build(progress=lambda _: None)
        into.mkdir(parents=True)
        shutil.copy(shipped / build.LIBRARY, into)
        source = into / "source"
        shutil.copytree(build.SOURCE, source)
        for name, text, other in changed:
            path = source / name
            before = path.read_text()
            assert before.count(text) == 1, (name, text)
            path.write_text(before.replace(text, other))
        compiler = shutil.which("cc") or "gcc"
        build.compile_c(compiler, [source / name for name in build.NIC_SOURCES], into / NIC)
        build.compile_c(
            compiler,
            [Path(__file__).with_name("driver.c")],
            into / "driver",
            *build.headers(compiler, progress=lambda _: None),
            f"-L{into}",
            f"-l:{build.LIBRARY}",
        )
        return cls(into)


class Driver:
    """One process with a device, memory, and a queue pair."""

    def __init__(self, verbs: Verbs, fabric: Path, address: str) -> None:
        self.address = address
        self._fabric = fabric
        self._process = subprocess.Popen(
            [verbs.folder / "driver"],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(verbs.folder),
                "SOFTVERBS_DEVICES": f"rdma0={address}",
                "SOFTVERBS_FABRIC": str(fabric),
                "SOFTVERBS_PATIENCE_MS": str(PATIENCE_MS),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.memory = self.number("memory", SIZE)
        assert self.number("open", 0) == 0
        self.nic = next(pid for pid in nics() if str(self._process.pid) in arguments(pid))
        self.key = self.number("register", ALL)
        self.pair = self.number("pair", 64)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *words: object) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"ended with status {self._process.wait()} at {words}"
        return answer.strip()

    def number(self, *words: object) -> int:
        return int(self.ask(*words))

    def meets(self, peer: Driver, access: int = ALL) -> None:
        """`access`: what the peer may do here."""
        assert self.number("meet", peer.pair, peer.address, access) == 0

    def posts(
        self,
        kind: str,
        peer: Driver,
        ident: int,
        *,
        offset: int = 0,
        length: int = SIZE,
        key: int | None = None,
        remote: int | None = None,
    ) -> int:
        """The error of one posted request of `length` bytes at `offset`, here and there."""
        return self.number(
            *(kind, self.key if key is None else key, peer.memory),
            *(peer.key if remote is None else remote, offset, length, ident),
        )

    def completions(self, count: int, ms: int = 6000) -> list[tuple[int, int]]:
        """(id, status) of the next `count`, or of those that came within `ms` milliseconds."""
        words = self.ask("poll", count, ms).split()
        return [(int(word.split(":")[0]), int(word.split(":")[1])) for word in words]

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is sent to this device inside waits on the network until the block is left."""
        mark = self._fabric / f"{self.address}.hold"
        mark.touch()
        try:
            yield
        finally:
            mark.unlink()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        eventually(lambda: not arguments(self.nic))


@dataclass
class Two:
    """A sender and a receiver that have met."""

    sender: Driver
    receiver: Driver


@contextmanager
def two(verbs: Verbs, fabric: Path) -> Iterator[Two]:
    drivers: list[Driver] = []
    try:
        for address in (HERE, THERE):
            drivers.append(Driver(verbs, fabric, address))
        sender, receiver = drivers
        receiver.meets(sender)
        sender.meets(receiver)
        assert sender.number("fill", 7) == 0
        yield Two(sender, receiver)
    finally:
        for driver in drivers:
            driver.end()


def nics() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_nic(int(name))]


def _is_nic(pid: int) -> bool:
    return arguments(pid)[:1] == [NIC]


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def eventually(holds: Callable[[], bool], within_s: float = 6.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
