"""How commands speak: progress on stderr, so that stdout has the result and nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Progress = Callable[[str], None]
"""Takes a line that says how far something is; `say` is one."""


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `show` reads."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")


def show(args: argparse.Namespace, result: Result, table: Callable[[Result], str]) -> None:
    """Print `result`, as a table or as JSON; with --output also write the JSON to a file."""
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        say(f"lab: result written to {args.output}")
    print(json.dumps(result, indent=2) if args.json else table(result))
