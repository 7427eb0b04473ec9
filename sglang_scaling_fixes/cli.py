"""`sglang-scaling-fixes`: doctor, and the lab that reproduces the failures and proves the fixes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_scaling_fixes import __version__, doctor
from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.errors import ScalingFixesError
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.scenarios import SCENARIOS
from sglang_scaling_fixes.retry import command as retry

SOAK_RELEASE = "0.5.23"
SERVE_MODELS = ("tiny-glm-5.1",)


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser(
        "doctor",
        help="would a server started here load the plugin, and which fixes would hold in it?",
        description="Loads plugins through the installed SGLang's own loader, in a fresh process "
        "with this environment, as a server does when it starts. A fix is armed only if SGLang "
        "called the plugin and the fix was attached and proven there. Run it before you rely on "
        f"the environment ({PLUGIN_ENV}): where SGLang does not load the plugin, the variable does "
        "nothing and no server can say so. Exit status: 0 all that is asked for is in force, 1 it "
        "is not, 2 it could not be asked.",
    )
    check.add_argument("--json", action="store_true", help="machine-readable output")
    check.add_argument(
        "--plugin",
        metavar="FIX[,FIX...]",
        help="fixes to ask for (default: the environment's, or else what a bare --plugin arms)",
    )
    check.set_defaults(run=_doctor)

    race = commands.add_parser("racecheck", help="is a build's HiCache ordered? on any CPU")
    which = race.add_mutually_exclusive_group()
    which.add_argument("--release", metavar="RELEASE", help="a stock release, for example 0.5.18")
    which.add_argument("--installed", action="store_true", help="what is installed (the default)")
    which.add_argument(
        "--matrix", type=Path, metavar="FILE", help="every release, stock and fixed, as Markdown"
    )
    race.add_argument("--fixes", choices=("on", "off"), default="off", help="attach ours (off)")
    race.add_argument("--json", action="store_true", help="machine-readable output")
    race.set_defaults(run=_racecheck)

    proxy = commands.add_parser(
        "retry-proxy", help="before workers: what one loses or spoils, another is asked for"
    )
    retry.add_arguments(proxy)
    proxy.set_defaults(run=retry.run)

    lab = commands.add_parser("lab", help="stock SGLang on a CPU: reproduce and prove")
    labs = lab.add_subparsers(required=True, metavar="COMMAND")

    install = labs.add_parser("install", help="install a stock release for the lab")
    install.add_argument("release", metavar="RELEASE", help="for example 0.5.12")
    install.set_defaults(run=_install)

    reclaim = labs.add_parser(
        "reclaim", help="abort while KV is on the wire: stock, then with --plugin"
    )
    reclaim.add_argument("--release", required=True, metavar="RELEASE")
    reclaim.add_argument(
        "--scenario",
        default="abort",
        metavar="NAME",
        help="default abort; "
        + "; ".join(f"{plan.name}: {plan.what}" for plan in SCENARIOS.values()),
    )
    reclaim.add_argument(
        "--rounds", type=_positive, default=3, help="rounds in each half (default 3)"
    )
    reclaim.add_argument("--seed", type=int, default=1, help="prompts of every round (default 1)")
    reclaim.add_argument("--json", action="store_true", help="print the result as JSON")
    reclaim.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    reclaim.set_defaults(run=_reclaim)

    serve = labs.add_parser("serve", help="the tiny GLM-5.1 on this CPU; until Ctrl-C")
    serve.add_argument("--model", choices=SERVE_MODELS, default=SERVE_MODELS[0])
    serve.add_argument("--pd", action="store_true", help="a prefill and a decode server")
    serve.add_argument("--hicache", action="store_true", help="a host tier for prefixes")
    serve.add_argument("--spec", action="store_true", help="speculative decoding, its MTP layer")
    serve.add_argument(
        "--cp", type=int, choices=(1, 2, 4), default=1, help="ranks that share a prefill (1)"
    )
    serve.add_argument(
        "--layer-split", action="store_true", help="each rank keeps some layers (--pd --cp)"
    )
    serve.add_argument("--once", action="store_true", help="ask one request, print it as JSON, end")
    serve.add_argument(
        "flags", nargs="*", metavar="-- FLAG", help="for SGLang, for example -- --plugin"
    )
    serve.set_defaults(run=_serve)

    soak = labs.add_parser("soak", help="random load, aborts, kills and stalls; is all right?")
    soak.add_argument("--release", default=SOAK_RELEASE, metavar="RELEASE")
    soak.add_argument("--minutes", type=_minutes, default=10.0, help="of load (default 10)")
    soak.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    soak.add_argument("--stock", action="store_true", help="without the plugin: the control")
    soak.add_argument("--json", action="store_true", help="print the result as JSON")
    soak.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    soak.set_defaults(run=_soak)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return value


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes up to a day")
    return value


def _doctor(args: argparse.Namespace) -> int:
    result = doctor.report(args.plugin)
    print(json.dumps(result, indent=2) if args.json else _doctor_text(result))
    return 0 if doctor.in_force(result) else 1


def _doctor_text(result: dict[str, Any]) -> str:
    mooncake = result["mooncake"]
    lines = [
        f"SGLang    {result['sglang'] or 'not installed'}",
        "Mooncake  "
        + (f"{mooncake['version']} ({mooncake['protocol']})" if mooncake else "not installed"),
    ]
    lines += _plugin_lines(result["plugin"])
    if result["standins"]:
        lines.append("No GPU here: probed with the lab's CPU stand-ins.")
    lines.append("")
    width = max(len(fix["name"]) for fix in result["fixes"])
    for fix in result["fixes"]:
        asked = "*" if fix["name"] in result["asked"] else " "
        said = result["plugin"] is not None and fix["reason"] == result["plugin"]["reason"]
        reason = "the plugin is not loaded" if said else fix["reason"]
        lines.append(f"{asked} {fix['name']:<{width}}  {fix['state']:<11}  {reason}")
    lines.append("")
    lines.append("* asked for")
    return "\n".join(lines)


def _plugin_lines(plugin: dict[str, Any] | None) -> list[str]:
    """Whether SGLang loads us and from where; nothing where there is no SGLang to ask."""
    if plugin is None:
        return []
    if not plugin["loaded"]:
        return [f"Plugin    NOT LOADED by servers here: {plugin['reason']}"]
    lines = [f"Plugin    loaded by SGLang from {plugin['folder']}"]
    if len(plugin["copies"]) > 1:
        copies = ", ".join(f"{copy['version']} in {copy['folder']}" for copy in plugin["copies"])
        lines.append(f"          installed more than once ({copies}); keep one")
    return lines


def _racecheck(args: argparse.Namespace) -> int:
    from sglang_scaling_fixes import racecheck
    from sglang_scaling_fixes.racecheck import matrix

    if args.matrix is not None:
        args.matrix.write_text(matrix.build(progress=_say))
        return 0
    result = racecheck.check(args.release or racecheck.INSTALLED, args.fixes)
    print(json.dumps(result, indent=2) if args.json else racecheck.text(result))
    return racecheck.exit_status(result)


def _install(args: argparse.Namespace) -> int:
    from sglang_scaling_fixes.lab.install import install

    found = install(args.release, progress=_say)
    _say(f"lab: sglang {args.release} is ready at {found.python}")
    return 0


def _reclaim(args: argparse.Namespace) -> int:
    from sglang_scaling_fixes.lab import reclaim

    result = reclaim.run(
        args.release, args.scenario, seed=args.seed, rounds=args.rounds, progress=_say
    )
    _show(args, result, reclaim_table)
    return 0 if reclaim.intact(result["fixed"]) else 1


def _serve(args: argparse.Namespace) -> int:
    from sglang_scaling_fixes.lab import serve

    options = serve.Options(
        pd=args.pd,
        hicache=args.hicache,
        spec=args.spec,
        cp=args.cp,
        layer_split=args.layer_split,
        flags=tuple(args.flags),
    )
    try:
        answer = serve.run(options, progress=_say, once=args.once)
    except KeyboardInterrupt:
        _say("lab: servers ended")
        return 0
    print(json.dumps(answer, indent=2))
    return 0


def _soak(args: argparse.Namespace) -> int:
    from sglang_scaling_fixes.lab import soak

    result = soak.run(args.release, args.minutes, args.seed, progress=_say, stock=args.stock)
    _show(args, result, soak_table)
    return 0 if soak.passed(result) else 1


def _show(
    args: argparse.Namespace, result: dict[str, Any], table: Callable[[dict[str, Any]], str]
) -> None:
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        _say(f"lab: result written to {args.output}")
    print(json.dumps(result, indent=2) if args.json else table(result))


_COLUMNS = ("requests", "aborted", "victims", "refused", "corrupted_pages", "wrong_outputs")


def reclaim_table(result: dict[str, Any]) -> str:
    """The result as a small table: stock and fixed, one row each."""
    rows = [["", *(name.replace("_", " ") for name in _COLUMNS)]]
    rows += [[half, *(str(result[half][c]) for c in _COLUMNS)] for half in ("stock", "fixed")]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    title = f"SGLang {result['release']}, scenario {result['scenario']}"
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    if result["stock_safe"]:
        lines.append("Stock is safe here: nothing of its victims was corrupted in these rounds.")
    return "\n".join(["", title, *lines, ""])


SOAK_ROWS = (
    "requests", "right", "aborted", "hung_up", "refused", "unanswered", "corrupted_outputs",
    "corrupted_kv", "leaked_tokens", "leaked_metadata", "held_tokens", "aborts", "kills", "stalls",
    "fences",
)  # fmt: skip


def soak_table(result: dict[str, Any]) -> str:
    """The counts, one a line; then proofs and what refused requests were told."""
    width = max(len(name) for name in SOAK_ROWS)
    lines = ["", f"SGLang {result['release']}, soak of {result['minutes']:g} min, {result['half']}"]
    lines += [f"{name.replace('_', ' '):<{width}}  {result[name]:>6}" for name in SOAK_ROWS]
    proofs = ", ".join(f"{name} {count}" for name, count in result["frees_by_proof"].items())
    lines.append(f"{'frees by proof':<{width}}  {proofs or 'none'}")
    lines += [f"{count:>6} x {words}" for words, count in result["refusals"].items()]
    if result["decode_crashed"]:
        lines.append(f"The decode server ended by itself: logs in {result['run_dir']}")
    return "\n".join([*lines, ""])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
