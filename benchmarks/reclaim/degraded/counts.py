"""What became of the requests, as numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from benchmarks.reclaim.degraded.exchange import Answer
from sglang_scaling_fixes.lab.races.soak import normal

HEALTHY, AILING = "healthy", "ailing"
PREFILLS = (HEALTHY, AILING)
HEALTHY_GOAL = 0.97
_TEXTS = 6
_TEXT_LENGTH = 160


class Outcome(Enum):
    """How a request ended for its client."""

    CORRECT = "correct"
    WRONG = "wrong"
    REFUSED = "refused"  # 503
    FAILED = "failed"
    ABORTED = "aborted"  # by the benchmark itself


@dataclass(frozen=True)
class Record:
    """One request that ended; seconds since the load began."""

    prefill: str
    ended_s: float
    outcome: Outcome
    why: str = ""


def judge(answer: Answer, right: Sequence[int], aborted: bool) -> tuple[Outcome, str]:
    """`aborted`: the benchmark aborted it. An answer counts all the same if it came."""
    body = answer.body if isinstance(answer.body, dict) else {}
    reason = ((body.get("meta_info") or {}).get("finish_reason") or {}).get("type")
    if answer.status == 200 and reason != "abort":
        correct = body.get("output_ids") == list(right)
        return (Outcome.CORRECT, "") if correct else (Outcome.WRONG, "")
    why = normal(f"{answer.status} {answer.body!s}")[:_TEXT_LENGTH]
    if aborted:
        return Outcome.ABORTED, why
    return (Outcome.REFUSED if answer.status == 503 else Outcome.FAILED), why


def longest_gap_s(records: Iterable[Record], seconds: float) -> float:
    """The longest time without a correct answer, from the load's begin to its end."""
    answered = sorted(r.ended_s for r in records if r.outcome is Outcome.CORRECT)
    moments = [0.0, *answered, seconds]
    return round(max(b - a for a, b in itertools.pairwise(moments)), 1)


def count(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Of one half in one case: per prefill, together, and the texts of what was not answered."""
    result: dict[str, Any] = {}
    for name in PREFILLS:
        own = [record for record in records if record.prefill == name]
        result[name] = {**_numbers(own), "longest_gap_s": longest_gap_s(own, seconds)}
    together = {"longest_gap_s": longest_gap_s(records, seconds)}
    result["all"] = {**_numbers(records), **together}
    texts = Counter(
        f"{r.prefill} {r.outcome.value}: {r.why}" for r in records if r.why
    ).most_common(_TEXTS)
    result["texts"] = dict(texts)
    return result


def _numbers(records: Sequence[Record]) -> dict[str, int]:
    found = Counter(record.outcome for record in records)
    return {outcome.value: found[outcome] for outcome in Outcome}


def compare(
    stock: Sequence[dict[str, Any]], fixed: Sequence[dict[str, Any]], more: bool
) -> dict[str, Any]:
    """Ratios of correct answers over all rounds of a case, and which goals are reached.

    `more`: armed is to answer more than stock, and not only as many.
    """
    correct = {
        (half, who): sum(one[who]["correct"] for one in rounds)
        for half, rounds in (("stock", stock), ("fixed", fixed))
        for who in (HEALTHY, "all")
    }
    ours, theirs = correct["fixed", "all"], correct["stock", "all"]
    wrong = sum(one["all"]["wrong"] for one in fixed)
    return {
        "healthy_ratio": _ratio(correct["fixed", HEALTHY], correct["stock", HEALTHY]),
        "all_ratio": _ratio(ours, theirs),
        "goals": {
            f"healthy prefill at least {HEALTHY_GOAL} of stock": (
                correct["fixed", HEALTHY] >= HEALTHY_GOAL * correct["stock", HEALTHY]
            ),
            "all more than stock" if more else "all at least stock": (
                ours > theirs if more else ours >= theirs
            ),
            "nothing wrong": wrong == 0,
        },
    }


def _ratio(ours: int, theirs: int) -> float | None:
    """None where stock answered nothing."""
    return round(ours / theirs, 3) if theirs else None
