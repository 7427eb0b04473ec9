"""Request throughput of a prefill/decode pair, stock beside armed, with and without aborts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.reclaim import figures
from benchmarks.reclaim.load import Answers, Shape, schedule
from benchmarks.reclaim.pair import (
    Bench,
    Progress,
    alternating,
    check,
    folder_for_logs,
    report_when_nothing_is_held,
)
from sglang_scaling_fixes.lab.cluster import Cluster
from sglang_scaling_fixes.lab.errors import LabError

_BACK = re.compile(r"token slots back after ([0-9.]+) s")
_COUNTED = ("gave_up", "returned", "asks", "held_tokens_max", "frees")


def measure(release: str, shape: Shape, runs: int, progress: Progress) -> dict[str, Any]:
    """`runs` fresh stock pairs and as many armed ones, alternating, on the same schedule."""
    requests, answers = schedule(shape), Answers()
    done: list[dict[str, Any]] = []
    with folder_for_logs(progress) as folder:
        bench = Bench(release, folder, progress)
        for number, half in enumerate(alternating(runs), 1):
            with bench.load(half, shape) as (cluster, load, warm):
                burst = load.run(requests)
                check(burst)
                run = {"half": half, **burst.summary()}
                if half == "fixed":
                    run["reclaim"] = armed_report(cluster, len(requests))
            if half == "stock":
                answers.learn(warm)
                if not shape.abort_share:
                    answers.learn(burst)
            answers.given(half, burst)
            done.append(run)
            progress(f"run {number} of {2 * runs}, {half}: {run['requests_per_s']} requests/s")
    return {
        "shape": asdict(shape),
        "runs": done,
        "requests_per_s": figures.compare([(r["half"], r["requests_per_s"]) for r in done]),
        "cpu_ms_per_request": figures.compare([(r["half"], server_cpu(r)) for r in done]),
        "answers": answers.verdict(),
        **({"holds": _holds(done)} if shape.abort_share else {}),
    }


def server_cpu(run: dict[str, Any]) -> float:
    """CPU milliseconds of both servers per completed request."""
    cpu: dict[str, float] = run["cpu_ms"]
    return sum(ms for who, ms in cpu.items() if who != "client")


def armed_report(cluster: Cluster, requests: int) -> dict[str, Any]:
    """Proof that this half ran armed, and what it did."""
    report = report_when_nothing_is_held(cluster)
    if report["exposures"] < requests // 2 or not report["peers"]:
        raise LabError(f"the armed pair did not use safe reclaim: {report}")
    log = cluster.decode.process.log.read_text(errors="replace")
    return {
        **{name: report[name] for name in _COUNTED},
        "hold_ms": [round(1e3 * float(seconds), 1) for seconds in _BACK.findall(log)],
    }


def _holds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How long slots of aborted requests were withheld, over all armed runs."""
    reclaims = [run["reclaim"] for run in runs if "reclaim" in run]
    held = [ms for reclaim in reclaims for ms in reclaim["hold_ms"]]
    return {
        "count": len(held),
        "median_ms": figures.percentile(held, 0.5) if held else None,
        "p99_ms": figures.percentile(held, 0.99) if held else None,
        "max_ms": max(held, default=None),
        "held_tokens_max": max(r["held_tokens_max"] for r in reclaims),
    }


def wrong(result: dict[str, Any]) -> int:
    """Wrong answers of the armed half: any is a failure of the benchmark."""
    return int(result["answers"]["wrong"]["fixed"])
