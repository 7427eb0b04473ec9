"""`sglang-scaling-fixes lab reclaim`: its flags, and the race it runs."""

from __future__ import annotations

import argparse

from sglang_scaling_fixes.console import add_result_arguments, say, show
from sglang_scaling_fixes.lab.races import run as race
from sglang_scaling_fixes.lab.races.report import race_table
from sglang_scaling_fixes.lab.races.scenarios import SCENARIOS
from sglang_scaling_fixes.lab.verbs.flag import add_transport_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", required=True, metavar="RELEASE")
    parser.add_argument(
        "--scenario",
        default="abort",
        metavar="NAME",
        help="default abort; "
        + "; ".join(f"{plan.name}: {plan.what}" for plan in SCENARIOS.values()),
    )
    parser.add_argument("--rounds", type=_rounds, default=3, help="rounds in each half (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="prompts of every round (default 1)")
    add_transport_argument(parser)
    add_result_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Status 1 if the fixed half was corrupted. Raises LabError."""
    result = race.run(
        args.release,
        args.scenario,
        seed=args.seed,
        rounds=args.rounds,
        progress=say,
        transport=args.transport,
    )
    show(args, result, race_table)
    return 0 if race.intact(result["fixed"]) else 1


def _rounds(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return value
