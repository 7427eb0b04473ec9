"""What safe reclaim costs; from the repository root. How to read it: README.md beside this."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

from benchmarks.common import reports
from benchmarks.reclaim import holds, ledger, memory, pair, report, share, storm, throughput
from benchmarks.reclaim.degraded import command as degraded_command
from benchmarks.reclaim.degraded import report as degraded_report
from benchmarks.reclaim.load import Shape
from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.errors import ScalingFixesError
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.verbs.flag import add_transport_argument


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 measured, 1 an armed answer was wrong, memory grew or a goal of `degraded`
    was not reached, 2 it could not run."""
    args = _parser().parse_args(argv)
    try:
        pair.refuse_settings(dict(os.environ))
        return int(args.run(args))
    except (ScalingFixesError, LabError, ValueError) as error:
        print(f"benchmarks.reclaim: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reclaim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    installed = importlib.metadata.version("sglang")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "--output", type=Path, metavar="FILE", help="default: results/RELEASE.json beside this"
    )
    common = argparse.ArgumentParser(add_help=False, parents=[output])
    common.add_argument("--release", default=installed, help=f"default {installed}")
    load = argparse.ArgumentParser(add_help=False, parents=[common])
    load.add_argument("--concurrency", type=int, default=8)
    load.add_argument("--prompt-tokens", type=int, default=64)
    load.add_argument("--new-tokens", type=int, default=8)
    load.add_argument("--seed", type=int, default=1)
    turns = argparse.ArgumentParser(add_help=False, parents=[load])
    turns.add_argument(
        "--sessions",
        type=int,
        default=10,
        help="of fresh servers (default 10); take an even number",
    )
    turns.add_argument(
        "--seconds", type=float, default=40.0, help="of each half in a session (default 40)"
    )
    turns.add_argument("--turn", type=float, default=0.25, help="seconds (default 0.25)")
    add_transport_argument(turns)
    turns.add_argument("--control", action="store_true", help="stock against stock")
    turns.set_defaults(run=_throughput, requests=0)

    plain = commands.add_parser("throughput", parents=[turns], help="no request is aborted")
    plain.set_defaults(part="throughput", abort_share=0.0, abort_within=0.0)
    aborts = commands.add_parser("aborts", parents=[turns], help="some requests are aborted")
    aborts.add_argument("--abort-share", type=float, default=0.1)
    aborts.add_argument(
        "--abort-within", type=float, default=0.3, help="seconds after the sending (default 0.3)"
    )
    aborts.set_defaults(part="aborts")

    share = commands.add_parser(
        "share", parents=[load], help="of an armed pair's CPU time, in the plugin; by sampling"
    )
    share.add_argument("--seconds", type=int, default=60, help="of load (default 60)")
    share.add_argument("--requests", type=int, default=150, help="in each burst (default 150)")
    share.set_defaults(run=_share, abort_share=0.0, abort_within=0.0)

    trouble = commands.add_parser(
        "degraded", parents=[common], help="one of two prefills is in trouble; root"
    )
    degraded_command.add_arguments(trouble)
    trouble.set_defaults(run=_degraded)

    hold = commands.add_parser(
        "holds", parents=[common], help="hold time beside the remaining write; root"
    )
    hold.add_argument("--rounds", type=int, default=10)
    hold.add_argument("--rate-mbit", type=float, default=48.0)
    hold.add_argument("--seed", type=int, default=1)
    hold.set_defaults(run=_holds)

    alone = commands.add_parser("ledger", parents=[output], help="no servers, one core")
    alone.add_argument("--requests", type=int, default=100_000)
    alone.add_argument("--repeats", type=int, default=5)
    alone.set_defaults(run=_ledger, release=installed)

    soak = commands.add_parser("memory", parents=[output], help="flat over a million requests?")
    soak.add_argument("--requests", type=int, default=1_000_000)
    soak.add_argument("--seed", type=int, default=1)
    soak.set_defaults(run=_memory, release=installed)

    silence = commands.add_parser(
        "storm", parents=[output], help="decode's scheduler when a prefill falls silent; no servers"
    )
    silence.add_argument(
        "--transfers",
        type=int,
        nargs="+",
        default=list(storm.TRANSFERS),
        help="given up at once (default 64 512 2000)",
    )
    silence.add_argument("--repeats", type=int, default=5)
    silence.set_defaults(run=_storm, release=installed)
    return parser


def _shape(args: argparse.Namespace) -> Shape:
    return Shape(
        args.requests,
        args.concurrency,
        args.prompt_tokens,
        args.new_tokens,
        args.seed,
        args.abort_share,
        args.abort_within,
    )


def _throughput(args: argparse.Namespace) -> int:
    plan = throughput.Plan(args.sessions, args.seconds, args.turn, args.transport)
    result = throughput.measure(args.release, _shape(args), plan, say, control=args.control)
    part = args.part + "_rdma" * (args.transport == "rdma") + "_control" * args.control
    reports.save(_path(args), args.release, part, result)
    print(report.throughput_table(result))
    return 1 if throughput.wrong(result) else 0


def _share(args: argparse.Namespace) -> int:
    result = share.measure(args.release, _shape(args), args.seconds, say)
    reports.save(_path(args), args.release, "share", result)
    print(report.share_line(result))
    return 0


def _degraded(args: argparse.Namespace) -> int:
    result = degraded_command.measure(args, say)
    reports.save(_path(args), args.release, "degraded", result)
    print(degraded_report.table(result))
    return 0 if degraded_report.reached(result) else 1


def _holds(args: argparse.Namespace) -> int:
    result = holds.measure(args.release, args.rounds, args.seed, args.rate_mbit, say)
    reports.save(_path(args), args.release, "holds", result)
    print(report.holds_table(result))
    return 0


def _ledger(args: argparse.Namespace) -> int:
    result = ledger.measure(args.requests, args.repeats)
    reports.save(_path(args), args.release, "ledger", result)
    print(report.ledger_table(result))
    return 0


def _memory(args: argparse.Namespace) -> int:
    result = memory.measure(args.requests, args.seed, say)
    reports.save(_path(args), args.release, "memory", result)
    wrong = memory.exceeded(result)
    print("\n".join(wrong) or report.memory_line(result))
    return 1 if wrong else 0


def _storm(args: argparse.Namespace) -> int:
    result = storm.measure(args.transfers, args.repeats)
    reports.save(_path(args), args.release, "storm", result)
    print(report.storm_table(result))
    return 0


def _path(args: argparse.Namespace) -> Path:
    return args.output or report.RESULTS / f"{args.release}.json"


if __name__ == "__main__":
    sys.exit(main())
