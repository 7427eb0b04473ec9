"""`engines`' roles as processes: over TCP, or over RDMA verbs in software."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.lab.install import install
from sglang_scaling_fixes.lab.verbs import Transport
from sglang_scaling_fixes.lab.verbs.build import over_rdma
from sglang_scaling_fixes.release import sglang_version

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """One of `engines`' roles. With several addresses it has an RDMA device at each."""

    def __init__(
        self,
        transport: Transport,
        *argv: str,
        addresses: tuple[str, ...] = ("127.0.0.1",),
        env: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "tests.mooncake.engines", *argv]
        full = {**os.environ, **_libraries(), "MC_FORCE_TCP": "1", **(env or {})}
        if transport == "rdma":
            devices = {f"rdma{i}": address for i, address in enumerate(addresses)}
            command, full = over_rdma(command, full, devices)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=full,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def heard(self) -> Any:
        """What it says next; Mooncake's own lines are passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"ended with status {self._process.wait()}")

    def tell(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The process, but over RDMA not its NIC, stands still inside."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def processes(transport: Transport, mode: str, once: str) -> Iterator[tuple[Process, Process]]:
    receiver, sender = Process(transport, "receive", mode), Process(transport, "send", once)
    try:
        yield receiver, sender
    finally:
        sender.end()
        receiver.end()


def _libraries() -> Mapping[str, str]:
    release = sglang_version()
    assert release is not None
    return install(release, progress=lambda _: None).env
