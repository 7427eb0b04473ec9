"""`sglang-scaling-fixes racecheck`: its flags, and the check it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_scaling_fixes import racecheck
from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.racecheck import matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--release", metavar="RELEASE", help="a stock release, for example 0.5.18")
    which.add_argument("--installed", action="store_true", help="what is installed (the default)")
    which.add_argument(
        "--matrix", type=Path, metavar="FILE", help="every release, stock and fixed, as Markdown"
    )
    parser.add_argument("--fixes", choices=("on", "off"), default="off", help="attach ours (off)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """The status that `racecheck.exit_status` gives the result; 0 after a matrix."""
    if args.matrix is not None:
        args.matrix.write_text(matrix.build(progress=say))
        return 0
    result = racecheck.check(args.release or racecheck.INSTALLED, args.fixes)
    print(json.dumps(result, indent=2) if args.json else racecheck.text(result))
    return racecheck.exit_status(result)
