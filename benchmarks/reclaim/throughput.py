"""Request throughput of a prefill/decode pair, stock beside armed, with and without aborts.

What else runs on the same hardware changes the speed of a shared machine's cores by half
within a second, and no counter of the machine shows it. Two measurements that lie
seconds apart therefore cannot tell a percent; two turns of a quarter of a second in a
row can, if there are enough of them (`turns`). A session is one start of both pairs;
several are needed, since each process has its own memory layout.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import figures, processes
from benchmarks.reclaim.load import PROMPTS, Answers, Reply, Shape, schedule
from benchmarks.reclaim.pair import (
    HALVES,
    Bench,
    alternating,
    check,
    folder_for_logs,
    report_when_nothing_is_held,
)
from benchmarks.reclaim.turns import Half, half
from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.servers.cluster import Cluster
from sglang_scaling_fixes.lab.verbs import Transport

BLOCK_TURNS = 80
"""Turns of each half that are one entry of the result. Requests end in batches, so a
count is off by up to a batch at either end of a block: little, if the block is long."""
_MOST_PER_S = 200
"""More requests a second than any machine answers here: the length of the schedule."""
_BACK = re.compile(r"(?:token slots back|proven) after ([0-9.]+) s")
_COUNTED = ("gave_up", "returned", "aborts_sent", "held_tokens_max", "frees")


@dataclass(frozen=True)
class Plan:
    """How long: sessions, seconds of each half in a session, seconds of one turn."""

    sessions: int
    seconds: float
    turn: float
    transport: Transport = "tcp"

    @property
    def turns(self) -> int:
        return max(1, round(self.seconds / self.turn))


def measure(
    release: str, shape: Shape, plan: Plan, progress: Progress, *, control: bool
) -> dict[str, Any]:
    """Stock and armed in turns; stock is both halves in a `control`."""
    shape = replace(shape, requests=round(_MOST_PER_S * plan.seconds))
    answers, sessions = Answers(), list[dict[str, Any]]()
    with folder_for_logs(progress) as folder:
        bench = Bench(release, folder, progress, plan.transport)
        for number in range(1, plan.sessions + 1):
            first, second = HALVES if number % 2 else HALVES[::-1]
            with (
                _half(bench, first, shape, answers, control) as one,
                _half(bench, second, shape, answers, control) as other,
            ):
                session = _session({first: one, second: other}, plan, answers, shape, control)
            sessions.append(session)
            progress(f"session {number} of {plan.sessions}: fixed/stock {session['ratio']}")
    return {
        "control": control,
        "shape": asdict(shape),
        "plan": asdict(plan),
        "sessions": sessions,
        **_compare(sessions),
        "answers": answers.verdict(),
    }


@contextlib.contextmanager
def _half(bench: Bench, name: str, shape: Shape, answers: Answers, control: bool) -> Iterator[Half]:
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-client-", dir=bench.folder))
    with bench.load("stock" if control else name, shape) as (cluster, load, warm):
        if name == "stock":
            answers.learn(warm)
        if name == "stock" and shape.abort_share:
            answers.learn(load.run(schedule(replace(shape, requests=4 * PROMPTS, abort_share=0.0))))
        with half(cluster, shape, folder) as ready:
            yield ready


def _session(
    halves: dict[str, Half], plan: Plan, answers: Answers, shape: Shape, control: bool
) -> dict[str, Any]:
    for pair in halves.values():
        pair.begin()
    busy = processes.machine_cpu_seconds()
    turns = [(name, *halves[name].turn(plan.turn)) for name in alternating(plan.turns)]
    busy = processes.machine_cpu_seconds() - busy
    elapsed = sum(seconds for _, _, seconds in turns)
    session: dict[str, Any] = {}
    for name, pair in halves.items():
        completed, seconds = _blocks([turn[1:] for turn in turns if turn[0] == name])
        busy -= pair.server_cpu + pair.client_cpu
        session[name] = {
            "requests_per_s": round(sum(completed) / sum(seconds), 3),
            "server_cpu_ms": round(1e3 * pair.server_cpu / sum(completed), 2),
            "client_cpu_ms": round(1e3 * pair.client_cpu / sum(completed), 2),
            "completed": completed,
            "seconds": seconds,
        }
    rates = {name: session[name]["requests_per_s"] for name in halves}
    session["ratio"] = round(rates["fixed"] / rates["stock"], 4)
    session["other_cores"] = round(max(0.0, busy) / elapsed, 3)
    for name, pair in halves.items():
        replies = pair.end()
        if name == "fixed" and not control:
            session["reclaim"] = armed_report(pair.cluster, len(replies))
        pair.stop()
        session[name]["aborted"] = sum(reply.aborted for reply in replies)
        _take(name, replies, answers, shape)
    return session


def _blocks(turns: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Requests completed and seconds of each block of turns."""
    blocks = [turns[i : i + BLOCK_TURNS] for i in range(0, len(turns), BLOCK_TURNS)]
    completed = [sum(count for count, _ in block) for block in blocks]
    return completed, [round(sum(seconds for _, seconds in block), 3) for block in blocks]


def _take(name: str, replies: Sequence[Reply], answers: Answers, shape: Shape) -> None:
    check(replies)
    if name == "stock" and not shape.abort_share:
        answers.learn(replies)
    answers.given(name, replies)


def _compare(sessions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All turns together, with the intervals that resampling blocks and sessions gives.

    Sessions differ by more than their blocks do, so theirs is the interval to go by.
    """
    rates = {
        name: [
            count / seconds
            for session in sessions
            for count, seconds in zip(
                session[name]["completed"], session[name]["seconds"], strict=True
            )
        ]
        for name in HALVES
    }
    started = {name: [s[name]["requests_per_s"] for s in sessions] for name in HALVES}
    cpu = [s["fixed"]["server_cpu_ms"] / s["stock"]["server_cpu_ms"] for s in sessions]
    result: dict[str, Any] = {
        "requests_per_s": {name: round(statistics.mean(rates[name]), 3) for name in HALVES},
        "ratio": figures.ratio(rates["fixed"], rates["stock"]),
        "ratio_over_sessions": figures.ratio(started["fixed"], started["stock"]),
        "ratio_per_session": figures.spread([s["ratio"] for s in sessions]),
        "cpu_ratio_per_session": figures.spread(cpu),
    }
    if held := [ms for s in sessions if "reclaim" in s for ms in s["reclaim"]["hold_ms"]]:
        result["holds"] = {
            "count": len(held),
            "median_ms": figures.percentile(held, 0.5),
            "p99_ms": figures.percentile(held, 0.99),
            "max_ms": max(held),
            "held_tokens_max": max(s["reclaim"]["held_tokens_max"] for s in sessions),
        }
    return result


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


def wrong(result: dict[str, Any]) -> int:
    """Wrong answers of the armed half: any is a failure of the benchmark."""
    return int(result["answers"]["wrong"]["fixed"])
