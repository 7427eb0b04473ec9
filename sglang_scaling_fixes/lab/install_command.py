"""`sglang-scaling-fixes lab install`: a stock release for the lab."""

from __future__ import annotations

import argparse

from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.lab.install import install


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", metavar="RELEASE", help="for example 0.5.12")


def run(args: argparse.Namespace) -> int:
    """Status 0 once the release is there. Raises LabError."""
    found = install(args.release, progress=say)
    say(f"lab: sglang {args.release} is ready at {found.python}")
    return 0
