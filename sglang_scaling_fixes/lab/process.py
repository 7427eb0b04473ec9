"""A process of the lab under its guard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_scaling_fixes.lab import guard

_GUARD = Path(guard.__file__)
_END_S = 20.0


class Guarded:
    """A command that ends when `end` is called or when this Python process is gone."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        guard_options: Sequence[str] = (),
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), *guard_options, "--", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                start_new_session=True,
            )

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status of the command, None while it runs."""
        return self._guard.poll()

    def pids(self) -> list[int]:
        """The command's processes, the guard not among them."""
        return guard.descendants(self._guard.pid)

    def end(self) -> None:
        """Kill the command with all its descendants and wait until they are gone."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        try:
            self._guard.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._guard.terminate()
            self._guard.wait()

    def tail(self, lines: int = 8) -> str:
        """The last lines of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])
