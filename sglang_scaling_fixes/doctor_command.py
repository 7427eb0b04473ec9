"""`sglang-scaling-fixes doctor`: its flags, and what it found as text."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sglang_scaling_fixes import doctor
from sglang_scaling_fixes.config import PLUGIN_ENV


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Loads plugins through the installed SGLang's own loader, in a fresh process "
        "with this environment, as a server does when it starts. A fix is armed only if SGLang "
        "called the plugin and the fix was attached and proven there. Run it before you rely on "
        f"the environment ({PLUGIN_ENV}): where SGLang does not load the plugin, the variable does "
        "nothing and no server can say so. Exit status: 0 all that is asked for is in force, 1 it "
        "is not, 2 it could not be asked."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--again",
        action="store_true",
        help="prove it now, though it was proven before with the same files and environment",
    )
    parser.add_argument(
        "--plugin",
        metavar="FIX[,FIX...]",
        help="fixes to ask for (default: the environment's, or else what a bare --plugin arms)",
    )


def run(args: argparse.Namespace) -> int:
    """Status 1 if a fix that is asked for is not in force. Raises ScalingFixesError."""
    result = doctor.report(args.plugin, again=args.again)
    print(json.dumps(result, indent=2) if args.json else text(result))
    return 0 if doctor.in_force(result) else 1


def text(result: dict[str, Any]) -> str:
    """Versions, whether the plugin is loaded, and one line per fix."""
    mooncake = result["mooncake"]
    untested = f" ({result['untested']})" if result["untested"] else ""
    lines = [
        f"SGLang    {result['sglang'] or 'not installed'}{untested}",
        *_patch_lines(result["patches"]),
        "Mooncake  "
        + (f"{mooncake['version']} ({mooncake['protocol']})" if mooncake else "not installed"),
    ]
    lines += _plugin_lines(result["plugin"])
    if (proof := result["proof"]) is not None and proof["kept"]:
        lines.append(f"Proven    {proof['at']}, with these files (--again: prove it now)")
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


def _patch_lines(found: list[dict[str, str]]) -> list[str]:
    return [f"Patch     {patch['name']}: {patch['state']}" for patch in found]


def _plugin_lines(plugin: dict[str, Any] | None) -> list[str]:
    """Whether SGLang loads us and from where; nothing where there is no SGLang to ask."""
    if plugin is None:
        return []
    if not plugin["loaded"]:
        return [f"Plugin    NOT LOADED by servers here: {plugin['reason']}"]
    lines = [f"Plugin    loaded by SGLang from {plugin['folder']}, {plugin['reason']}"]
    if len(plugin["copies"]) > 1:
        copies = ", ".join(f"{copy['version']} in {copy['folder']}" for copy in plugin["copies"])
        lines.append(f"          installed more than once ({copies}); keep one")
    return lines
