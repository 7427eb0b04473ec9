"""CPU time as the kernel counts it (ticks of 10 ms): of servers, and of the whole machine."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> dict[str, float]:
    """User plus system time so far: of the scheduler, and of a server's other processes."""
    ticks: Counter[str] = Counter()
    for pid in pids:
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            kind = "scheduler" if b"scheduler" in title else "rest"
            ticks[kind] += int(fields[11]) + int(fields[12])
    return {kind: count / _TICK for kind, count in ticks.items()}


def machine_cpu_seconds() -> float:
    """Time all cores together were not idle so far, whoever kept them busy."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / _TICK
