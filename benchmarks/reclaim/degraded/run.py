"""Stock and armed servers in the same troubles, by turns.

Both halves are up all the time; the one whose turn it is not stands still (SIGSTOP).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from benchmarks.reclaim.degraded import known
from benchmarks.reclaim.degraded.cases import Case
from benchmarks.reclaim.degraded.counts import AILING, HEALTHY, Record, compare, count
from benchmarks.reclaim.degraded.half import Half, half
from benchmarks.reclaim.degraded.known import Prompts
from benchmarks.reclaim.degraded.load import Load, Pressure
from benchmarks.reclaim.pair import FLAGS, HALVES, Bench, alternating, folder_for_logs
from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError


@dataclass(frozen=True)
class Settings:
    """`fixed_flags`: of the armed half."""

    pressure: Pressure
    rounds: int
    pool_tokens: int
    seed: int
    fixed_flags: tuple[str, ...] = FLAGS["fixed"]


def measure(
    release: str, cases: Sequence[Case], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Each case as often as there are rounds, each time on both halves."""
    began = time.monotonic()
    flags = {"stock": FLAGS["stock"], "fixed": settings.fixed_flags}
    with folder_for_logs(progress) as folder, ExitStack() as stack:
        bench = Bench(release, folder, progress)
        halves: dict[str, Half] = {}
        for name in HALVES:
            one = stack.enter_context(half(bench, name, flags[name], settings.pool_tokens))
            if name == "stock":
                prompts = _learn(one, settings.seed)
                progress(
                    f"{len(prompts.short)} short and {len(prompts.long)} long prompts are known"
                )
            else:
                _refuse_other_answers(one, prompts)
            halves[name] = one
            stack.callback(one.go)
            one.stand_still()
        found = [_case(case, halves, prompts, settings, progress) for case in cases]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "cases": found,
        "seconds": round(time.monotonic() - began, 1),
    }


def _learn(stock: Half, seed: int) -> Prompts:
    """What is right, from a stock pair before any trouble; a warm-up as well."""
    kinds = []
    for candidates, wanted in zip(known.candidates(seed), (known.SHORT, known.LONG), strict=True):
        asked = [
            stock.ask(HEALTHY, candidates, at_once=1),
            stock.ask(AILING, candidates, at_once=1),
            stock.ask(HEALTHY, candidates, at_once=4),
        ]
        kinds.append(known.agreed(candidates, asked, wanted))
    return Prompts(*kinds)


def _refuse_other_answers(fixed: Half, prompts: Prompts) -> None:
    """Undisturbed, the armed half answers as stock does, or nothing can be compared."""
    every = [*prompts.short, *prompts.long]
    for prefill in (HEALTHY, AILING):
        answers = fixed.ask(prefill, [one.prompt for one in every], at_once=4)
        if answers != [one.ids for one in every]:
            raise LabError("undisturbed, the armed half answers otherwise than stock")


def _case(
    case: Case,
    halves: dict[str, Half],
    prompts: Prompts,
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in HALVES}
    for name in alternating(settings.rounds):
        result = _play(case, halves[name], prompts, settings)
        rounds[name].append(result)
        progress(f"{case.name}, {name}: {result['all']}, started anew: {result['started_anew']}")
    return {
        "name": case.name,
        "what": case.what,
        **rounds,
        **compare(rounds["stock"], rounds["fixed"], case.more),
    }


def _play(case: Case, one: Half, prompts: Prompts, settings: Settings) -> dict[str, Any]:
    """One case on one half, from well to well."""
    pressure = settings.pressure
    one.go()
    started = one.mend(prompts.short[0])
    load = Load(case, one.ends, prompts, pressure, settings.seed, one.rooms)
    began = time.monotonic()
    running: Future[list[Record]] = one.start(load.run)
    for at, act in case.script:
        time.sleep(max(0.0, began + at - time.monotonic()))
        one.act(act)
    records = running.result()
    one.calm()
    started += one.mend(prompts.short[0])
    one.stand_still()
    return {**count(records, pressure.seconds), "started_anew": started}
