"""`sglang-scaling-fixes lab soak`: its flags, and the soak it runs."""

from __future__ import annotations

import argparse

from sglang_scaling_fixes.console import add_result_arguments, say, show
from sglang_scaling_fixes.lab.races import soak
from sglang_scaling_fixes.lab.races.report import soak_table
from sglang_scaling_fixes.lab.verbs.flag import add_transport_argument

RELEASE = "0.5.23"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", default=RELEASE, metavar="RELEASE")
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="of load (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--stock", action="store_true", help="without the plugin: the control")
    add_transport_argument(parser)
    add_result_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Status 1 if anything was corrupted, leaked or unanswered. Raises LabError."""
    result = soak.run(
        args.release,
        args.minutes,
        args.seed,
        progress=say,
        stock=args.stock,
        transport=args.transport,
    )
    show(args, result, soak_table)
    return 0 if soak.passed(result) else 1


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes up to a day")
    return value
