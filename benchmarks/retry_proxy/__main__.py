"""Direct and through the proxy, in one run, in turn; from the repository root.

latency    small requests one after the other, direct and through, alternating
paced      streams at the pace of decoding, one event a write: proxy CPU per event
unpaced    streams as fast as they are taken: wall rate through the proxy over direct
stopped    clients that read nothing of large events: the proxy's memory
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.common.reports import machine, table
from benchmarks.retry_proxy.client import Caller, stopped, streams

STOPPED, STOPPED_SIZE, STOPPED_SECONDS = 200, 100_000, 10.0
RESULTS = Path(__file__).parent / "results"
CONCURRENCY = (1, 16, 64)
PACED_RATE = 2000.0
"""Events per second of all streams together; a single stream has a tenth of it."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 an aim was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retry_proxy", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="for the latency, of each half")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each paced run")
    parser.add_argument("--events", type=int, default=100_000, help="of each unpaced run")
    parser.add_argument("--hold-tokens", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "result.json", metavar="FILE")
    args = parser.parse_args(argv)
    with (
        _worker() as (worker, floor),
        _proxy(worker, args.hold_tokens) as (proxy, process),
    ):
        result: dict[str, Any] = {
            "machine": machine(),
            "hold_tokens": args.hold_tokens,
            "latency": latency(worker, proxy, args.requests),
            "paced": [paced(proxy, process, floor, n, args.seconds) for n in CONCURRENCY],
            "unpaced": [unpaced(worker, proxy, process, n, args.events) for n in CONCURRENCY],
            "proxy_rss_mib": _rss_mib(process),
            "stopped": stopped_readers(proxy, process),
        }
    result["aims"] = aims(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(text(result))
    return 0 if all(result["aims"].values()) else 1


def latency(worker: int, proxy: int, requests: int) -> dict[str, float]:
    """Milliseconds."""
    direct, through = Caller(worker), Caller(proxy)
    times: dict[str, list[float]] = {"direct": [], "through": []}
    for number in range(-100, requests):
        one, other = direct.call(), through.call()
        if number >= 0:  # the first ones warm up
            times["direct"].append(one * 1000)
            times["through"].append(other * 1000)
    direct.close()
    through.close()
    found = {f"{name}_median": statistics.median(t) for name, t in times.items()}
    found |= {f"{name}_p99": statistics.quantiles(t, n=100)[98] for name, t in times.items()}
    found["median_difference"] = found["through_median"] - found["direct_median"]
    return {name: round(value, 3) for name, value in found.items()}


def paced(
    proxy: int, process: psutil.Process, floor: psutil.Process, count: int, seconds: float
) -> dict[str, Any]:
    """`floor`: the worker, which wakes up and writes for each event, and does nothing else."""
    rate = PACED_RATE / 10 if count == 1 else PACED_RATE / count
    events = max(1, round(rate * seconds))
    before, worker_before = _cpu(process), _cpu(floor)
    took = uvloop.run(streams(proxy, count, events, 1 / rate))
    spent, worker_spent = _cpu(process) - before, _cpu(floor) - worker_before
    return {
        "streams": count,
        "events_per_s": round(count * events / took),
        "events_per_cpu_s": round(count * events / spent),
        "us_per_event": round(1e6 * spent / (count * events), 1),
        "worker_us_per_event": round(1e6 * worker_spent / (count * events), 1),
    }


def unpaced(
    worker: int, proxy: int, process: psutil.Process, count: int, events: int
) -> dict[str, Any]:
    each = events // count
    direct = uvloop.run(streams(worker, count, each, 0.0))
    before = _cpu(process)
    through = uvloop.run(streams(proxy, count, each, 0.0))
    spent = _cpu(process) - before
    return {
        "streams": count,
        "direct_events_per_s": round(count * each / direct),
        "through_events_per_s": round(count * each / through),
        "ratio": round(direct / through, 3),
        "events_per_cpu_s": round(count * each / spent),
    }


def stopped_readers(proxy: int, process: psutil.Process) -> dict[str, Any]:
    before = _rss_mib(process)
    uvloop.run(stopped(proxy, STOPPED, 1000, STOPPED_SIZE, STOPPED_SECONDS))
    most = _rss_mib(process)
    return {
        "readers": STOPPED,
        "event_bytes": STOPPED_SIZE,
        "rss_before_mib": before,
        "rss_after_mib": most,
        "mib_each": round((most - before) / STOPPED, 2),
    }


def aims(result: dict[str, Any]) -> dict[str, bool]:
    """Whether each was met."""
    return {
        "median difference below 1 ms": result["latency"]["median_difference"] < 1.0,
        "a stopped reader takes 0.5 MB and two events at most": (
            result["stopped"]["mib_each"] <= (500_000 + 2 * STOPPED_SIZE) / 2**20
        ),
        # A lone stream pays for waking up, which the worker's own figure shows.
        "5000 events per CPU second, several paced streams": all(
            run["events_per_cpu_s"] >= 5000 for run in result["paced"] if run["streams"] > 1
        ),
    }


def text(result: dict[str, Any]) -> str:
    found = result["latency"]
    lines = [
        f"latency, ms: direct {found['direct_median']}, through {found['through_median']}, "
        f"difference {found['median_difference']} (p99 {found['direct_p99']}, "
        f"{found['through_p99']})"
    ]
    for name in ("paced", "unpaced"):
        rows = [tuple(key.replace("_", " ") for key in result[name][0])]
        rows += [tuple(str(value) for value in run.values()) for run in result[name]]
        lines += ["", name, table(rows)]
    kept = result["stopped"]
    lines += [
        "",
        f"{kept['readers']} readers that stop, events of {kept['event_bytes']} bytes: "
        f"{kept['rss_before_mib']} to {kept['rss_after_mib']} MiB, {kept['mib_each']} each",
    ]
    lines += ["", *(f"{'met' if met else 'MISSED'}: {aim}" for aim, met in result["aims"].items())]
    return "\n".join(lines)


def _rss_mib(process: psutil.Process) -> float:
    return float(round(process.memory_info().rss / 2**20, 1))


def _cpu(process: psutil.Process) -> float:
    """Seconds on a core, of all threads; to the nanosecond where the kernel counts those."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    if spent := sum(int(thread.read_text().split()[0]) for thread in threads):
        return spent / 1e9
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def _worker() -> Iterator[tuple[int, psutil.Process]]:
    command = [sys.executable, "-m", "benchmarks.retry_proxy.worker"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), psutil.Process(process.pid)
        finally:
            process.kill()


@contextlib.contextmanager
def _proxy(worker: int, hold_tokens: int) -> Iterator[tuple[int, psutil.Process]]:
    command = ["-m", "sglang_scaling_fixes.cli", "retry-proxy", "--port", "0"]
    command += ["--worker", f"http://127.0.0.1:{worker}", "--hold-tokens", str(hold_tokens)]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = process.stderr.readline().split()[1].rstrip(",")
            yield int(url.rpartition(":")[2]), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
