"""The result of `degraded` as text."""

from __future__ import annotations

from typing import Any

from benchmarks.common import reports
from benchmarks.reclaim.degraded.counts import PREFILLS
from benchmarks.reclaim.pair import HALVES

_HEAD = ("case", "half", "prefill", "correct", "refused", "failed", "wrong", "aborted", "gap s")


def table(result: dict[str, Any]) -> str:
    """One row per case, half, round and prefill; then ratios, goals and what was started anew."""
    rows: list[tuple[str, ...]] = [_HEAD]
    lines = []
    for case in result["cases"]:
        for half in HALVES:
            for one in case[half]:
                rows += [_row(case["name"], half, who, one[who]) for who in (*PREFILLS, "all")]
        lines.append(_verdict(case))
    return "\n".join([reports.table(rows), "", *lines])


def reached(result: dict[str, Any]) -> bool:
    """Whether every goal of every case is reached."""
    return all(all(case["goals"].values()) for case in result["cases"])


def _row(case: str, half: str, who: str, found: dict[str, Any]) -> tuple[str, ...]:
    return (
        case,
        half,
        who,
        *(str(found[name.replace("gap s", "longest_gap_s")]) for name in _HEAD[3:]),
    )


def _verdict(case: dict[str, Any]) -> str:
    missed = [goal for goal, met in case["goals"].items() if not met]
    lines = [
        f"{case['name']}: fixed/stock healthy {case['healthy_ratio']}, all {case['all_ratio']}; "
        + (f"MISSED: {', '.join(missed)}" if missed else "all goals reached")
    ]
    for half in HALVES:
        anew = [what for one in case[half] for what in one["started_anew"]]
        if anew:
            lines.append(f"  {half}: started anew afterwards: {', '.join(anew)}")
        for one in case[half]:
            lines += [f"  {half}: {times} x {text}" for text, times in one["texts"].items()]
    return "\n".join(lines)
