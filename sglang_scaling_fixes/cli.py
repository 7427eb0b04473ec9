"""`sglang-scaling-fixes`: the list of its commands.

A command is a module with `add_arguments(parser)` and `run(args)`, which returns the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from types import ModuleType

from sglang_scaling_fixes import __version__, doctor_command
from sglang_scaling_fixes.errors import ScalingFixesError
from sglang_scaling_fixes.lab import install_command
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.races import reclaim_command, soak_command
from sglang_scaling_fixes.lab.servers import serve_command
from sglang_scaling_fixes.layersplit.planner import plan_command
from sglang_scaling_fixes.layersplit.simulator import simulate_command
from sglang_scaling_fixes.patches import command as patch_command
from sglang_scaling_fixes.racecheck import command as racecheck_command
from sglang_scaling_fixes.retry import command as retry_command

Command = tuple[str, str, ModuleType]

COMMANDS: tuple[Command, ...] = (
    (
        "doctor",
        "would a server started here load the plugin, and which fixes would hold in it?",
        doctor_command,
    ),
    (
        "patch",
        "insert our lines into an SGLang that loads no plugins, or take them back",
        patch_command,
    ),
    ("racecheck", "is a build's HiCache ordered? on any CPU", racecheck_command),
    (
        "retry-proxy",
        "HTTP proxy that retries failed or corrupted requests on another worker",
        retry_command,
    ),
)
LAB_COMMANDS: tuple[Command, ...] = (
    ("install", "install a stock release for the lab", install_command),
    ("reclaim", "abort while KV is on the wire: stock, then with --plugin", reclaim_command),
    ("serve", "the tiny GLM-5.1 on this CPU; until Ctrl-C", serve_command),
    ("soak", "random load, aborts, kills and stalls; is all right?", soak_command),
)
LAYERSPLIT_COMMANDS: tuple[Command, ...] = (
    ("plan", "capacity, traffic and exposed time on given hardware; modelled", plan_command),
    ("simulate", "capacity, hits and goodput over a trace of requests; modelled", simulate_command),
)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all is well, 1 it ran and the answer is no, 2 it could not run."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ScalingFixesError, LabError) as error:
        print(f"sglang-scaling-fixes: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sglang-scaling-fixes: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-scaling-fixes",
        description="What keeps a stock SGLang's KV cache intact here, and the proof.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = _add(parser, COMMANDS)
    layersplit = commands.add_parser("layersplit", help="what LayerSplit would do; runs nothing")
    _add(layersplit, LAYERSPLIT_COMMANDS)
    lab = commands.add_parser("lab", help="stock SGLang on a CPU: reproduce and prove")
    _add(lab, LAB_COMMANDS)
    return parser


def _add(
    parser: argparse.ArgumentParser, listed: Iterable[Command]
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_text, module in listed:
        command = commands.add_parser(name, help=help_text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return commands


if __name__ == "__main__":
    raise SystemExit(main())
