"""Commands in processes of their own, however slow a busy machine makes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

LOOK_S = 300.0
LEAST_CPU_S = 10.0
"""A command that uses less CPU time than this between two looks, twice in a row, hangs. It would
get more beside fifty others on two cores. Once may happen: a cold disk gave an import 5.9 s."""
MOST_CPU_S = 2400.0
"""A command that has used so much CPU time will not end."""


STACKS_S = 5.0
"""Time that a command gets to write its stacks."""


class Hangs(AssertionError):
    """A command that does nothing any more, or does not end."""


def finished(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, and returns its status and output. Raises Hangs, and then kills it.

    The limit is on the CPU time that its processes use: too little of it, or too much. How long
    they take for that depends on what else the machine does. A Python that hangs says where.
    """
    words = [str(word) for word in command]
    env = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        before, idle = 0.0, 0
        while True:
            try:
                out, err = process.communicate(timeout=LOOK_S)
                return subprocess.CompletedProcess(words, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                used = _cpu_s(process.pid)
            idle = idle + 1 if used - before < LEAST_CPU_S else 0
            if idle > 1 or used > MOST_CPU_S:
                _kill(process.pid)
                _, err = process.communicate()
                what = f"{words[:3]} used {used:.1f} s of CPU time, {before:.1f} s of it"
                raise Hangs(f"{what} before the last {LOOK_S:.0f} s\n{err[-8000:]}")
            before = used


def said(python: str | Path, script: str, *argv: str, env: Mapping[str, str], mark: str) -> Any:
    """What the first line that opens with `mark` says; without one the test fails with stderr."""
    done = finished([python, "-c", script, *argv], env)
    lines = [line for line in done.stdout.splitlines() if line.startswith(mark)]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix(mark))


def _tree(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(pid: int) -> float:
    """CPU time of the process and its descendants so far."""
    total = 0.0
    for process in _tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _kill(pid: int) -> None:
    """End it and its descendants, one after the other. A Python first writes its stacks."""
    for process in _tree(pid):
        for number in (signal.SIGABRT, signal.SIGKILL):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                break
            psutil.wait_procs([process], timeout=STACKS_S)
