"""How much of an armed pair's CPU time is spent in the plugin, by sampling its stacks.

Throughput on a shared machine is too noisy for a difference of a percent. Here py-spy, which
SGLang brings, looks at both servers under load, and a sample is ours if, going up from
its innermost frame, the plugin's code comes before SGLang's: what the plugin calls (locks,
messages) counts as the plugin's, but for the lines at which a tap hands over to what it stands
in front of (a stock socket, queue or web server). On a machine whose cores are busy
that share is the throughput it costs; what it costs beside its own time (wake-ups, caches) is not
seen.
"""

from __future__ import annotations

import linecache
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sglang_scaling_fixes
from benchmarks.reclaim.load import Load, Shape, schedule
from benchmarks.reclaim.pair import Bench, check, folder_for_logs
from benchmarks.reclaim.throughput import armed_report
from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.servers.cluster import Cluster
from sglang_scaling_fixes.lab.servers.server import Server

RATE = 200  # samples a second
_OURS = str(Path(sglang_scaling_fixes.__file__).parent) + "/"
_LAB = _OURS + "lab/"  # stand-ins for a GPU: stock has them as well
_SGLANG = "/site-packages/sglang/"
_HAND_OVER = ("self._stock.", "await send(", "await self._app(")


def measure(release: str, shape: Shape, seconds: int, progress: Progress) -> dict[str, Any]:
    """`seconds` of load on an armed pair."""
    with folder_for_logs(progress) as folder:
        bench = Bench(release, folder, progress)
        with bench.load("fixed", shape) as (cluster, load, _):
            samples = _record(cluster, load, shape, seconds, folder)
            armed_report(cluster, shape.requests)
    total = sum(samples.values())
    return {
        "shape": asdict(shape),
        "seconds": seconds,
        "samples": total,
        "ours": samples["ours"],
        "share": round(samples["ours"] / total, 5),
    }


def _record(cluster: Cluster, load: Load, shape: Shape, seconds: int, folder: Path) -> Counter[str]:
    spies = [_spy(server, seconds, folder) for server in (cluster.decode, cluster.fast)]
    ended = threading.Event()

    def wait() -> None:
        for spy, _ in spies:
            spy.wait()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    while not ended.is_set():
        check(load.run(schedule(shape)))
    samples: Counter[str] = Counter()
    for spy, output in spies:
        if spy.returncode != 0 or not output.exists():
            raise LabError(f"py-spy ended with status {spy.returncode}; it needs root or ptrace")
        samples += count(output.read_text().splitlines())
    return samples


def _spy(server: Server, seconds: int, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    output = folder / f"{server.name}.stacks"
    command = [
        str(Path(sys.executable).with_name("py-spy")), "record", "--subprocesses",
        "--pid", str(min(server.process.pids())), "--duration", str(seconds),
        "--rate", str(RATE), "--format", "raw", "--full-filenames", "--nonblocking",
        "--output", str(output),
    ]  # fmt: skip
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet), output


def count(stacks: Iterable[str]) -> Counter[str]:
    """Samples by whose they are: `ours`, `sglang` or `other`, from lines `frame;frame;... N`."""
    samples: Counter[str] = Counter()
    for line in stacks:
        frames, _, number = line.rpartition(" ")
        samples[_owner(frames.split(";"))] += int(number)
    return samples


def _owner(frames: list[str]) -> str:
    for frame in reversed(frames):
        if _OURS in frame and _LAB not in frame:
            return "sglang" if _hands_over(frame) else "ours"
        if _SGLANG in frame:
            return "sglang"
    return "other"


def _hands_over(frame: str) -> bool:
    """Is `name (path:line)` a line that calls what SGLang would have called itself there?"""
    path, _, line = frame.rpartition("(")[2].rstrip(")").rpartition(":")
    text = linecache.getline(path, int(line)) if line.isdigit() else ""
    return any(call in text for call in _HAND_OVER)
