"""Fit, take apart, compare; write results/calibration.json and .md."""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.layersplit.calibration import published, report, rounds, warm
from benchmarks.layersplit.calibration.ablation import ablation
from benchmarks.layersplit.calibration.mechanisms import MECHANISMS, Fit, best, pair, spread
from benchmarks.layersplit.calibration.workload import Sessions
from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.layersplit.simulator import readers

HERE = Path(__file__).parents[1]
TRACE = HERE / "traces" / "agentic_code_30sessions_seed42.jsonl"
CONTEXTS = (40_000, 80_000, 120_000)
STARTS = (0, 11, 22)
"""Sessions of the trace with which the first user begins: how much hangs on the order."""
SPREAD_OF, ABLATION_AT = 120_000, (40_000, 120_000)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layersplit.calibration")
    parser.add_argument("--trace", type=Path, default=TRACE, help="of sessions (%(default)s)")
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="a folder (%(default)s)"
    )
    args = parser.parse_args()
    sessions = Sessions(readers.read(args.trace, readers.AUTO, None)[1])
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "trace": args.trace.name,
        "published": {
            "gain": published.GAIN,
            "rounds": asdict(published.ROUNDS),
            "warm_over_cold": published.PEGAFLOW,
        },
        "warm_over_cold": {context: warm.over_cold(context) for context in CONTEXTS},
        "fits": [],
        "rounds": [asdict(rounds.fitted(turn)) for turn in rounds.TURNS],
    }
    for mechanism in MECHANISMS:
        found["fits"].append(_told(best(mechanism, sessions, published.GAIN), sessions))
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (args.results / "calibration.json").write_text(text)
    (args.results / "calibration.md").write_text(report.text(json.loads(text)))
    say(f"written to {args.results}/calibration.json and .md")
    return 0


def _told(fit: Fit, sessions: Sessions) -> dict[str, Any]:
    say(f"{fit.mechanism.name}: takes apart {fit.setting}")
    played = {context: pair(sessions, context, fit.setting) for context in CONTEXTS}
    return {
        "mechanism": fit.mechanism.name,
        "says": fit.mechanism.says,
        "fitted": fit.mechanism.fitted,
        "candidates": len(fit.mechanism.candidates),
        "setting": asdict(fit.setting),
        "error": fit.error,
        "contexts": {
            context: {
                "gain": ours.goodput / unsplit.goodput,
                "unsplit": asdict(unsplit),
                "ours": asdict(ours),
            }
            for context, (unsplit, ours) in played.items()
        },
        "spread": {SPREAD_OF: spread(sessions, SPREAD_OF, fit.setting, STARTS)},
        "ablation": {context: ablation(sessions, context, fit.setting) for context in ABLATION_AT},
    }


if __name__ == "__main__":
    raise SystemExit(main())
