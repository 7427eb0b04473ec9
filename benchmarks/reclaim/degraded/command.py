"""The command line of `degraded`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from benchmarks.reclaim.degraded import run
from benchmarks.reclaim.degraded.cases import CASES, UNDISTURBED, chosen
from benchmarks.reclaim.degraded.load import Pressure
from benchmarks.reclaim.pair import FLAGS
from sglang_scaling_fixes.console import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(case.name for case in (*CASES, UNDISTURBED))
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="CASE",
        help=f"of {names}; default: all but the last",
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of load (default 40)")
    parser.add_argument("--rounds", type=int, default=1, help="of each case (default 1)")
    parser.add_argument("--clients", type=int, default=3, help="of each prefill (default 3)")
    parser.add_argument(
        "--pace",
        type=float,
        default=0.75,
        help="a client begins at most one request in so many seconds (default 0.75)",
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds until a request has failed (default 20)"
    )
    parser.add_argument("--pool-tokens", type=int, default=8000, help="default 8000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--armed-flags",
        default="",
        metavar="FLAGS",
        help='more flags of the armed half, as one word: "--safe-reclaim-resend 1"',
    )
    parser.add_argument("--control", action="store_true", help="stock against stock")


def measure(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """ValueError for a case that does not exist, or a load that is too short for one."""
    cases = chosen(args.cases, args.seconds)
    if min(args.rounds, args.clients) < 1 or min(args.pace, args.limit) <= 0:
        raise ValueError("--rounds and --clients: at least 1; --pace and --limit: more than 0")
    armed = (*FLAGS["fixed"], *shlex.split(args.armed_flags))
    settings = run.Settings(
        Pressure(args.seconds, args.clients, args.pace, args.limit),
        args.rounds,
        args.pool_tokens,
        args.seed,
        FLAGS["stock"] if args.control else armed,
    )
    return run.measure(args.release, cases, settings, progress)
