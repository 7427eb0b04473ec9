"""What ends a child process that hangs, and that a slow one is not taken for it."""

from __future__ import annotations

import sys

import pytest

from tests import child

SPIN = "while True: pass"
WORK = "import time\nwhile time.process_time() < 1.5: pass\nprint('done')"


def test_a_command_that_does_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LOOK_S", 1.0)
    with pytest.raises(child.Hangs, match="before the last 1 s"):
        child.finished([sys.executable, "-c", "import time; time.sleep(10_000)"])


def test_a_command_that_does_not_end_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LOOK_S", 0.5)
    monkeypatch.setattr(child, "LEAST_CPU_S", 0.0)
    monkeypatch.setattr(child, "MOST_CPU_S", 1.0)
    with pytest.raises(child.Hangs, match="of CPU time"):
        child.finished([sys.executable, "-c", SPIN])


def test_a_child_of_the_command_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LOOK_S", 1.0)
    monkeypatch.setattr(child, "LEAST_CPU_S", 0.001)
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}])"
    assert child.finished([sys.executable, "-c", script]).stdout == "done\n"


def test_the_status_and_the_output_are_the_commands() -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = child.finished([sys.executable, "-c", script])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
