"""What the guard costs per request and decoding step, in microseconds.

A stock request as a scheduler makes it; stock's own question whether it is finished, wrapped as
the plugin wraps it, with the guard bound and without, in turn. The difference is what an armed
server pays, the wrapper included; `look` is the guard's own part. A round is one request from
its first verification to its last, and fresh requests come for each.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from benchmarks.spec_guard.report import table
from sglang_scaling_fixes.specguard import attach, detector, probe
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.guard import SpecGuard
from sglang_scaling_fixes.specguard.taint import Taint

STEPS = 1000
"""Verifications of one request: thousands of generated tokens."""
ROUNDS = 15
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
    Load("accepts 2 of 3, new text", 3, (2, 3, 1, 2), 1 << 20),
    Load("accepts 3 of 3, new text: the repetition is counted", 3, (3,), 1 << 20),
    Load("no speculation", 3, None, 1 << 20),
)


def report() -> str:
    attach.attach()
    rows = []
    for load in LOADS:
        stock, armed, look = measure(load)
        rows.append(
            [load.name, f"{stock:.2f}", f"{armed:.2f}", f"{armed - stock:.2f}", f"{look:.2f}"]
        )
    head = ["a request that", "wrapped, not armed", "armed", "difference", "look alone"]
    unwrapped = f"{_bare():.2f}"
    counted = f"{_counting():.0f}"
    return (
        f"µs per request and verification, medians of {ROUNDS} rounds of {STEPS}.\n\n"
        + table(head, rows)
        + f"\nStock's own question without the wrapper: {unwrapped} µs. Counting the repetition of"
        f" {detector.TAIL} tokens once: {counted} µs, at most every {detector.PATIENCE} tokens.\n"
    )


def measure(load: Load) -> tuple[float, float, float]:
    """Stock with the wrapper, armed, and the guard's look alone: µs per step."""
    field = attach.accepted_field()
    finish = _finish()
    guard = SpecGuard(NEVER, "abort", Taint(PAGE), lambda: load.depth, field, speaks=False)
    saved = SpecGuard.current
    found: dict[str, list[float]] = {"stock": [], "armed": [], "look": []}
    try:
        for _ in range(ROUNDS):
            SpecGuard.current = None
            found["stock"].append(_round(load, field, finish))
            SpecGuard.current = guard
            found["armed"].append(_round(load, field, finish))
            found["look"].append(_round(load, field, _look(guard)))
    finally:
        SpecGuard.current = saved
    medians = {name: statistics.median(spent) for name, spent in found.items()}
    return medians["stock"], medians["armed"], medians["look"]


def _round(load: Load, field: str, call: Callable[[Any, int], object]) -> float:
    """µs per step, beyond what setting up the step costs."""
    req = _request(load)
    steps = list(_steps(load))
    values = req.__dict__
    extend, clock = req.output_ids.extend, time.perf_counter_ns
    spent = 0
    for verifications, accepted, tokens in steps:
        extend(tokens)
        values["spec_verify_ct"] = verifications
        values[field] = accepted
        began = clock()
        call(req, len(tokens))
        spent += clock() - began
    return spent / len(steps) / 1000 - _clock_us()


def _steps(load: Load) -> list[tuple[int, int, list[int]]]:
    """Totals after each step, and its tokens."""
    steps, total, at = [], 0, 0
    for number, accepted in enumerate(islice(cycle(load.accepted or (0,)), STEPS), start=1):
        total += accepted
        tokens = [100 + n % load.period for n in range(at, at + 1 + accepted)]
        at += 1 + accepted
        steps.append((number if load.accepted else 0, total, tokens))
    return steps


def _clock_us() -> float:
    """What reading the clock twice takes."""
    clock = time.perf_counter_ns
    spent = 0
    for _ in range(STEPS):
        began = clock()
        spent += clock() - began
    return spent / STEPS / 1000


def _request(load: Load) -> Any:
    req = probe._request(range(200))
    req.output_ids = array("q") if isinstance(req.output_ids, array) else []
    return req


def _finish() -> Callable[[Any, int], object]:
    owner, name, _ = probe._finish()
    wrapped: Callable[[Any, int], object] = getattr(owner, name)
    return wrapped


def _look(guard: SpecGuard) -> Callable[[Any, int], object]:
    """As the wrapper asks: only for a request that is verified."""

    def look(req: Any, _tokens: int) -> None:
        if req.spec_verify_ct:
            guard.look(req)

    return look


def _bare() -> float:
    """Stock's own question, without any wrapper."""
    stock = _finish().__wrapped__  # type: ignore[attr-defined]
    field = attach.accepted_field()
    return statistics.median(_round(LOADS[0], field, stock) for _ in range(ROUNDS))


def _counting() -> float:
    """µs of one count over a full tail."""
    tokens: Sequence[int] = array("q", range(4 * detector.TAIL))
    spent = []
    for _ in range(200):
        began = time.perf_counter_ns()
        detector.repetition(tokens)
        spent.append((time.perf_counter_ns() - began) / 1000)
    return statistics.median(spent)
