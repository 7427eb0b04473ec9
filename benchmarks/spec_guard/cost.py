"""What the guard costs per request and decoding step, in microseconds.

A stock request as a scheduler makes it; stock's own question whether it is finished, wrapped as
the plugin wraps it, without the wrapper, with it, and with a guard bound, in turn. The difference
is what an armed server pays. A round is one request from its first verification to its last.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from benchmarks.common.reports import markdown_table
from sglang_scaling_fixes.attach import resolve
from sglang_scaling_fixes.specguard import attach, detector, probe
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.guard import DraftCounters, SpecGuard
from sglang_scaling_fixes.specguard.reporting import Reporting
from sglang_scaling_fixes.specguard.taint import Taint

STEPS = 1000
"""Verifications of one request: thousands of generated tokens."""
ROUNDS = 15
COUNTS = 1000
PAGE = 64
NEVER = Rules(min_length=0.0)
"""Default rules, but for the low one: a request that is aborted costs nothing afterwards."""


@dataclass(frozen=True)
class Load:
    """Drafts accepted by one verification after another, over and over; None: no speculation."""

    name: str
    depth: int
    accepted: tuple[int, ...] | None
    period: int  # of the tokens: they repeat after so many


LOADS = (
    Load("accepts 2 of 3 drafts, new text", 3, (2, 3, 1, 2), 1 << 20),
    Load("accepts 3 of 3, new text: its repetition is counted", 3, (3,), 1 << 20),
    Load("no speculation", 3, None, 1 << 20),
)


def report() -> str:
    attach.attach()
    rows = []
    for load in LOADS:
        spent = measure(load)
        extra = spent["armed"] - spent["bare"]
        wrapper = spent["wrapped"] - spent["bare"]
        costs = (spent["bare"], wrapper, extra, spent["look"])
        rows.append([load.name, *(f"{cost:.2f}" for cost in costs)])
    head = ["a request", "stock", "more, not armed", "more, armed", "of it the guard's look"]
    return (
        f"µs of CPU per request and verification, medians of {ROUNDS} rounds of {STEPS}.\n\n"
        + markdown_table(head, rows)
        + f"\nCounting the repetition of {detector.TAIL} tokens once: {_counting():.0f} µs, at most"
        f" every {detector.PATIENCE} tokens.\n"
    )


def measure(load: Load) -> dict[str, float]:
    """µs per step: stock without the wrapper, with it, with a guard bound; its look alone."""
    field = attach.accepted_field()
    finish = _finish()
    drafts, silent = DraftCounters(load.depth, field), Reporting(is_reporting_rank=False)
    guard = SpecGuard(NEVER, "abort", Taint(PAGE), drafts, silent)
    bare = finish.__wrapped__  # type: ignore[attr-defined]
    # What is called, and whether a guard is bound then; all in turn, in every round.
    turns = {
        "nothing": (_nothing, None),
        "bare": (bare, None),
        "wrapped": (finish, None),
        "armed": (finish, guard),
        "look": (_look(guard), guard),
    }
    saved = SpecGuard.current
    spent: dict[str, list[float]] = {name: [] for name in turns}
    try:
        for _ in range(ROUNDS):
            for name, (call, bound) in turns.items():
                SpecGuard.current = bound
                spent[name].append(_round(load, field, call))
    finally:
        SpecGuard.current = saved
    medians = {name: statistics.median(found) for name, found in spent.items()}
    set_up = medians.pop("nothing")
    return {name: median - set_up for name, median in medians.items()}


def _round(load: Load, field: str, call: Callable[[Any, int], object]) -> float:
    """µs per step of this thread's CPU time, whatever else the machine does; with the set-up."""
    req = _request()
    values, extend = req.__dict__, req.output_ids.extend
    steps = _steps(load)
    began = time.thread_time_ns()
    for verifications, accepted, tokens in steps:
        extend(tokens)
        values["spec_verify_ct"] = verifications
        values[field] = accepted
        call(req, len(tokens))
    return (time.thread_time_ns() - began) / len(steps) / 1000


def _nothing(_req: Any, _tokens: int) -> None:
    """In place of a call: what is left is the set-up of a step."""


def _steps(load: Load) -> list[tuple[int, int, list[int]]]:
    """Totals after each step, and its tokens."""
    steps, total, at = [], 0, 0
    for number, accepted in enumerate(islice(cycle(load.accepted or (0,)), STEPS), start=1):
        total += accepted
        tokens = [100 + n % load.period for n in range(at, at + 1 + accepted)]
        at += 1 + accepted
        steps.append((number if load.accepted else 0, total, tokens))
    return steps


def _request() -> Any:
    req = probe._request(range(200))
    req.output_ids = array("q") if isinstance(req.output_ids, array) else []
    return req


def _finish() -> Callable[[Any, int], object]:
    owner, name, _ = resolve(attach.finish_target())
    wrapped: Callable[[Any, int], object] = getattr(owner, name)
    return wrapped


def _look(guard: SpecGuard) -> Callable[[Any, int], object]:
    """As the wrapper asks: only for a request that is verified."""

    def look(req: Any, _tokens: int) -> None:
        if req.spec_verify_ct:
            guard.inspect(req)

    return look


def _counting() -> float:
    """µs of one count over a full tail."""
    tokens = array("q", range(4 * detector.TAIL))
    began = time.thread_time_ns()
    for _ in range(COUNTS):
        detector.repetition(tokens)
    return (time.thread_time_ns() - began) / COUNTS / 1000
