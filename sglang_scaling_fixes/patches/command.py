"""`sglang-scaling-fixes patch`: its flags, and what was done as text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.patches import change, export, manifest, tree
from sglang_scaling_fixes.patches.change import Done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Inserts our lines into an SGLang of a release that loads no plugins, all or nothing. "
        "Exit status: 0 done, or all applied (check); 1 not all applied (check); 2 it could not "
        "be done, and nothing was changed."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("apply", "apply patches; those that are applied stay as they are"),
        ("check", "which patches are applied; changes nothing"),
        ("revert", "take patches back, or heal a tree whose patching was interrupted"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        _add_target(action)
        action.add_argument("--json", action="store_true", help="machine-readable output")

    staging = actions.add_parser(
        "export",
        help="patches for upstream as commits on a checkout, with their pull-request texts",
        description="Writes each patch for upstream as one commit on the checkout's HEAD, with "
        "its test, signed by the checkout's own git identity, and the text of its pull request. "
        "The checkout is only read.",
    )
    staging.add_argument("--to", type=Path, required=True, metavar="CHECKOUT", help="a git clone")
    staging.add_argument("--format", choices=("mbox",), default="mbox", help="for git am (mbox)")
    staging.add_argument(
        "--output",
        type=Path,
        default=Path("upstream"),
        metavar="FOLDER",
        help="where to (upstream)",
    )
    _add_names(staging, "of upstream")


def _add_names(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument(
        "patches", nargs="*", metavar="PATCH", help=f"only these (default: all {whose})"
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--to",
        type=Path,
        metavar="PATH",
        help="the folder that holds sglang/ or python/sglang/: an unpacked release, a checkout",
    )
    where.add_argument(
        "--installed", action="store_true", help="the SGLang of this Python (the default)"
    )
    _add_names(parser, "of the release")


def run(args: argparse.Namespace) -> int:
    """The exit status. Raises `ScalingFixesError`, and then nothing was changed."""
    known = manifest.load()
    if args.action == "export":
        return _export(known, args)
    root = tree.installed() if args.to is None else tree.find(args.to)
    if args.action != "check":
        done = {"apply": change.apply, "revert": change.revert}[args.action](
            known, root, args.patches
        )
        result = _result(done)
        print(json.dumps(result, indent=2) if args.json else _told(args.action, done))
        return 0
    result = checked(known, root, args.patches)
    print(json.dumps(result, indent=2) if args.json else _table(result))
    return 0 if all(patch["state"] == "applied" for patch in result["patches"]) else 1


def _export(known: manifest.Manifest, args: argparse.Namespace) -> int:
    wanted = tuple(known.patch(name) for name in args.patches) or known.upstream()
    for patch in wanted:
        if patch.kind != "upstream":
            names = ", ".join(each.name for each in known.upstream())
            raise ConfigError(
                f"patch {patch.name} is for operators, not for upstream; choose from {names}"
            )
    for one in export.export(wanted, export.Checkout(args.to), args.output):
        print(f"{one.mbox}  {one.patch.title}")
    return 0


def checked(known: manifest.Manifest, root: Path, names: list[str]) -> dict[str, Any]:
    """`{"release", "root", "interrupted", "patches": [{"name", "state"}], "foreign": [file]}`."""
    seen = tree.recognise(known, root, names)
    unfinished = change.interrupted(root)
    states = {patch.name: str(seen.state(patch)) for patch in seen.patches}
    return {
        "release": seen.release,
        "root": str(root),
        "interrupted": unfinished,
        "patches": [
            {"name": name, "state": "partial" if unfinished else state}
            for name, state in states.items()
        ],
        "foreign": seen.foreign(),
    }


def _result(done: Done) -> dict[str, Any]:
    return {
        "release": done.tree.release,
        "root": str(done.tree.root),
        "changed": list(done.changed),
        "healed": done.healed,
    }


def _told(action: str, done: Done) -> str:
    where = f"SGLang {done.tree.release} in {done.tree.root}"
    names = ", ".join(patch.name for patch in done.tree.patches)
    if done.healed:
        return f"{where}: an unfinished change was undone; it is as released. Restart its servers"
    if not done.changed:
        state = "applied already" if action == "apply" else "not applied"
        return f"{where}: {names}: {state}; nothing to do"
    verb = "applied" if action == "apply" else "taken back"
    return f"{where}: {', '.join(done.changed)}: {verb}. Restart its servers"


def _table(result: dict[str, Any]) -> str:
    lines = [f"SGLang {result['release']} in {result['root']}"]
    width = max(len(patch["name"]) for patch in result["patches"])
    lines += [f"{patch['name']:<{width}}  {patch['state']}" for patch in result["patches"]]
    lines += [f"foreign: {name}" for name in result["foreign"]]
    if result["interrupted"]:
        lines.append("An earlier change was not finished: run `sglang-scaling-fixes patch revert`")
    return "\n".join(lines)
