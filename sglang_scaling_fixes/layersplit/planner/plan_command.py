"""`sglang-scaling-fixes layersplit plan`: its flags, and the plan it prints."""

from __future__ import annotations

import argparse
import json

from sglang_scaling_fixes.layersplit.planner import flags, plan, pool_flags, report

DESCRIPTION = (
    "What LayerSplit would hold, send and leave exposed: without a split, with upstream's, with "
    "ours. Nothing is run or measured; the plan says what each figure is and by which formula. "
    "Tokens: 40000, or 40K for 40,000. Sizes: GiB and MiB (powers of 2), GB and MB (powers of 10)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    pool_flags.add_pool(parser)
    add("--context", required=True, metavar="TOKENS,...", help="lengths of a request: 40K,80K")
    add("--hit-rate", default="0.9", metavar="SHARE", help="share of it in the pool (%(default)s)")
    pool_flags.add_speed(parser)
    add("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Print the plan. Raises ConfigError."""
    found = plan.make(asked(args))
    print(json.dumps(found, indent=2) if args.json else report.text(found))
    return 0


def asked(args: argparse.Namespace) -> plan.Asked:
    """The flags as numbers. Raises ConfigError, which names flag, value and remedy."""
    return plan.Asked(
        pool_flags.pool(args),
        flags.token_list("--context", args.context),
        flags.share("--hit-rate", args.hit_rate),
        pool_flags.speed(args),
    )
