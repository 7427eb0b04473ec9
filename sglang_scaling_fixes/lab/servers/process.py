"""A process of the lab under its supervisor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_scaling_fixes.lab.servers import supervisor

_SUPERVISOR = Path(supervisor.__file__)
_END_S = 20.0


class Supervised:
    """A command that ends when `end` is called or when this Python process is gone."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        supervisor_options: Sequence[str] = (),
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", str(_SUPERVISOR), *supervisor_options, "--", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                start_new_session=True,
            )

    @property
    def supervisor_pid(self) -> int:
        return self._supervisor.pid

    @property
    def alive(self) -> bool:
        return self._supervisor.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status of the command, None while it runs."""
        return self._supervisor.poll()

    def pids(self) -> list[int]:
        """The command's processes, the supervisor not among them."""
        return supervisor.descendants(self._supervisor.pid)

    def end(self) -> None:
        """Kill the command with all its descendants and wait until they are gone."""
        if self._supervisor.stdin is not None:
            self._supervisor.stdin.close()
        try:
            self._supervisor.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._supervisor.terminate()
            self._supervisor.wait()

    def tail(self, lines: int = 8) -> str:
        """The last lines of the log."""
        return tail(self.log, lines)


def tail(log: Path, lines: int) -> str:
    """The last lines of a log, of its last 16 KiB at most."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
