"""Races stock and fixed servers of one release on the same schedule, and counts.

What a round is: `round`; the scenarios: `scenarios`.  A round that proves nothing is
repeated, a bounded number of times.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import install, lab_home
from sglang_scaling_fixes.lab.races import scenarios
from sglang_scaling_fixes.lab.races.round import Invalid, Race
from sglang_scaling_fixes.lab.races.short import ShortSends
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.cluster import Cluster
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.verbs import Transport
from sglang_scaling_fixes.lab.verbs.build import prepare

TRIES_PER_ROUND = 3
RUNS_KEPT = 40


def run(
    release: str,
    scenario: str = "abort",
    seed: int = 1,
    rounds: int = 3,
    progress: Progress = print,
    *,
    stock_only: bool = False,
    fixed_only: bool = False,
    shaped: bool = True,
    transport: Transport = "tcp",
) -> dict[str, Any]:
    """Race stock and fixed servers of `release` on the same schedule; counts per half.

    A half that was not asked for is None.  `shaped=False` takes the stalled link even
    where a shaped one is possible.
    """
    plan = scenarios.scenario(scenario)
    if rounds < 1:
        raise LabError(f"rounds={rounds}: at least 1 is needed")
    if stock_only and fixed_only:
        raise LabError("stock_only and fixed_only exclude each other")
    began = time.monotonic()
    environment = install(release, progress)
    prepare(transport, progress)
    checkpoint = checkpoints.llama(environment)
    run_dir = new_run_dir(release, plan.name)
    result: dict[str, Any] = {
        "release": release,
        "scenario": plan.name,
        "transport": transport,
        "seed": seed,
        "run_dir": str(run_dir),
        "stock": None,
        "fixed": None,
        "stock_safe": None,
        "ready_s": {},
    }
    details: dict[str, Any] = {}
    for half in ("stock", "fixed"):
        if (stock_only and half == "fixed") or (fixed_only and half == "stock"):
            continue
        tell = _prefixed(progress, half)
        folder = run_dir / half
        folder.mkdir()
        rate = plan.rate_for(release)
        with link(rate, folder, shaped=shaped, buffer_bytes=plan.buffer_bytes) as way:
            if way.mode == "stalled" and not plan.stallable:
                raise LabError(
                    f"scenario {plan.name} needs a shaped link, and there is none: {way.reason}."
                    " Run as root with iproute2 installed, or take scenario abort"
                )
            result["link"] = way.reason
            tell(f"starting 2 prefill servers and 1 decode server ({way.reason})")
            spec = plan.cluster(release, fixed=half == "fixed", transport=transport)
            with Cluster(environment, checkpoint, way, folder, spec) as cluster:
                tell(f"ready after {cluster.ready_s:.0f} s")
                kind = ShortSends if plan.ending is scenarios.Ending.SHORT else Race
                counts, details[half] = _half(kind(cluster, way, plan), seed, rounds, tell)
                result[half] = counts
                result["ready_s"][half] = round(cluster.ready_s, 1)
    if result["stock"] is not None:
        result["stock_safe"] = intact(result["stock"])
    result["rounds"] = details
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def intact(half: dict[str, int]) -> bool:
    """Whether a half's victims kept their KV and got the right answers."""
    return half["corrupted_pages"] == 0 and half["wrong_outputs"] == 0


def new_run_dir(release: str, name: str) -> Path:
    """A fresh folder for logs; the oldest ones go."""
    runs = lab_home() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in sorted(runs.iterdir())[: -RUNS_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)
    run_dir = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{release}-{name}-{os.getpid()}"
    run_dir.mkdir()
    return run_dir


def _prefixed(progress: Progress, half: str) -> Progress:
    return lambda line: progress(f"{half}: {line}")


def _half(
    race: Race, seed: int, rounds: int, progress: Progress
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    done = []
    for number in range(1, rounds + 1):
        reasons: list[str] = []
        for attempt in range(1, TRIES_PER_ROUND + 1):
            try:
                outcome = race.round(number, attempt, seed)
            except Invalid as reason:
                progress(f"round {number} does not count: {reason}")
                reasons.append(str(reason))
                race.settle()
                continue
            done.append(outcome)
            progress(
                f"round {number}: {outcome.corrupted_pages} KV slots corrupted,"
                f" {outcome.wrong_outputs} of {outcome.victims} outputs wrong"
            )
            break
        else:
            raise LabError(
                f"round {number} was not valid in {TRIES_PER_ROUND} tries ({reasons[-1]});"
                f" logs in {race.cluster.decode.process.log.parent}"
            )
    counts = {
        "requests": race.cluster.requests,
        "aborted": sum(item.aborted for item in done),
        "victims": sum(item.victims for item in done),
        "refused": sum(item.refused for item in done),
        "corrupted_pages": sum(item.corrupted_pages for item in done),
        "wrong_outputs": sum(item.wrong_outputs for item in done),
    }
    return counts, [asdict(item) for item in done]
