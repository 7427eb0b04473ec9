"""Throughput of two warm pairs on one machine, stock and armed, in bursts that alternate.

Fresh servers take most of a minute to start, and a shared machine drifts more in that
time than the difference to be measured. Here both pairs are up at once and the one
whose turn it is not stands still (SIGSTOP): two bursts to be compared lie seconds apart.
A session is one such quadruple of servers; several are needed, since each process has
its own memory layout.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.reclaim import figures
from benchmarks.reclaim.load import Answers, Load, Shape, schedule
from benchmarks.reclaim.pair import HALVES, Bench, Progress, alternating, check, folder_for_logs
from benchmarks.reclaim.throughput import armed_report, server_cpu
from sglang_scaling_fixes.lab.cluster import Cluster, Server


def measure(
    release: str, shape: Shape, sessions: int, bursts: int, progress: Progress, *, control: bool
) -> dict[str, Any]:
    """`bursts` of `shape` on each half in each session; stock is both halves in a `control`."""
    answers, done = Answers(), list[list[dict[str, Any]]]()
    with folder_for_logs(progress) as folder:
        bench = Bench(release, folder, progress)
        for number in range(1, sessions + 1):
            first, second = HALVES if number % 2 else HALVES[::-1]
            with (
                _pair(bench, first, shape, answers, control) as one,
                _pair(bench, second, shape, answers, control) as other,
            ):
                pairs = {first: one, second: other}
                done.append(_session(pairs, shape, bursts, answers))
                if not control:
                    with _running(pairs["fixed"][0]):
                        armed_report(pairs["fixed"][0], shape.requests)
            ratio = _compare(done[-1], "requests_per_s")["pairs"]["median"]
            progress(f"session {number} of {sessions}: fixed/stock {ratio}")
    everything = [run for session in done for run in session]
    return {
        "control": control,
        "shape": asdict(shape),
        "sessions": done,
        "requests_per_s": _compare(everything, "requests_per_s"),
        "cpu_ms_per_request": _compare(everything, "server_cpu_ms"),
        "ratio_per_session": [
            _compare(session, "requests_per_s")["pairs"]["median"] for session in done
        ],
        "other_cores": round(statistics.mean(run["other_cores"] for run in everything), 3),
        "answers": answers.verdict(),
    }


def _compare(runs: Sequence[dict[str, Any]], figure: str) -> dict[str, Any]:
    return figures.compare([(run["half"], run[figure]) for run in runs])


def _session(
    pairs: dict[str, tuple[Cluster, Load]], shape: Shape, bursts: int, answers: Answers
) -> list[dict[str, Any]]:
    runs = []
    for number, half in enumerate(alternating(bursts)):
        cluster, load = pairs[half]
        # The two bursts that are compared send the same requests.
        requests = schedule(replace(shape, seed=shape.seed + number // 2))
        with _running(cluster):
            burst = load.run(requests)
        check(burst)
        if half == "stock":
            answers.learn(burst)
        answers.given(half, burst)
        summary = burst.summary()
        runs.append({"half": half, **summary, "server_cpu_ms": server_cpu(summary)})
    return runs


@contextlib.contextmanager
def _pair(
    bench: Bench, half: str, shape: Shape, answers: Answers, control: bool
) -> Iterator[tuple[Cluster, Load]]:
    """A warm pair that stands still; it goes on before it is ended."""
    with bench.load("stock" if control else half, shape) as (cluster, load, warm):
        if half == "stock":
            answers.learn(warm)
        _signal((cluster.decode, cluster.fast), signal.SIGSTOP)
        try:
            yield cluster, load
        finally:
            _signal((cluster.fast, cluster.decode), signal.SIGCONT)


@contextlib.contextmanager
def _running(cluster: Cluster) -> Iterator[None]:
    """Prefill goes first and stops last: decode looks for its heartbeat."""
    _signal((cluster.fast, cluster.decode), signal.SIGCONT)
    try:
        yield
    finally:
        _signal((cluster.decode, cluster.fast), signal.SIGSTOP)


def _signal(servers: Sequence[Server], number: signal.Signals) -> None:
    for server in servers:
        for pid in server.process.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
