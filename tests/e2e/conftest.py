"""A test that fails says what its servers were doing. Where one fell silent, nobody waits again."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from sglang_scaling_fixes.lab.servers.process import tail
from sglang_scaling_fixes.lab.servers.server import ANSWER_S

LOG_LINES = 12
FRAMES = 4  # of each thread, the innermost
PY_SPY = Path(sys.executable).with_name("py-spy")

_SILENT: dict[Path, str] = {}  # a file of tests, and its test that waited for an answer in vain


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path in _SILENT:
        pytest.fail(f"not tried: {_SILENT[item.path]} waited {ANSWER_S:g} s in vain", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.path not in _SILENT:
        report.sections += [(f"server {log.stem}", said(log, of)) for log, of in servers().items()]
        if call.duration > ANSWER_S:
            _SILENT[item.path] = item.nodeid
    return report


def servers() -> dict[Path, list[psutil.Process]]:
    """By its log: the processes of each server that this process has started and not ended."""
    found: dict[Path, list[psutil.Process]] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            log = Path(f"/proc/{process.pid}/fd/1").readlink()
        except OSError:  # gone meanwhile
            continue
        if log.suffix == ".log":
            found.setdefault(log, []).append(process)
    return found


def said(log: Path, processes: list[psutil.Process]) -> str:
    lines = [line[:300] for line in tail(log, LOG_LINES).splitlines()]
    for process in processes:
        with process.oneshot():
            lines.append(f"{process.pid} {process.name()} {process.status()} {process.cpu_times()}")
        if "scheduler" in " ".join(process.cmdline()):
            lines += stacks(process.pid)
    return "\n".join(lines)


def stacks(pid: int) -> list[str]:
    """A line for each thread: where it is, and who called that."""
    command = [str(PY_SPY), "dump", "--pid", str(pid)]
    dump = subprocess.run(command, capture_output=True, text=True, check=False)
    if dump.returncode:
        return [dump.stderr.strip()]
    threads = re.split(r"^Thread ", dump.stdout, flags=re.MULTILINE)[1:]
    return [
        "  " + " < ".join(line.strip() for line in thread.splitlines()[: FRAMES + 1])
        for thread in threads
    ]
