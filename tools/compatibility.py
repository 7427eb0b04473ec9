"""Asks `doctor` on every stock release, bare and patched, and writes `docs/compatibility.md`.

    python -m tools.compatibility

Each answer is `sglang-scaling-fixes doctor --plugin FIX,...` with all fixes, in a process of its
own, of the release's own wheel on the dependencies of a lab release. No server is started. It takes
a core for four minutes; nothing is kept from earlier answers.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.attach import LAST_RELEASE
from sglang_scaling_fixes.fixes import FIX_NAMES
from sglang_scaling_fixes.lab import install, wheels
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.patches import change, manifest
from sglang_scaling_fixes.paths import ROOT
from sglang_scaling_fixes.racecheck import patched

DOCUMENT = ROOT / "docs" / "compatibility.md"
LAB_RELEASE = "0.5.12"
"""Its dependencies serve every release but the newest, as in the tests."""

HEAD = """# Compatibility, release by release

Written by `python -m tools.compatibility`; do not edit. Result of {date}.

Each row is the answer of `sglang-scaling-fixes doctor` on the stock wheel of that release, asked
for all fixes, on a CPU with the lab's stand-ins: stock's own plugin loader (or the patch
`plugin-loader`) called the plugin, each fix was attached, and its probe was asked. *Patched* is
with all patches of the release (`sglang-scaling-fixes patch apply`). A number is a reason below the
table. What a server refuses by its flags is not asked here.
"""

Rows = list[tuple[str, dict[str, Any]]]
"""`[(what was asked, what doctor said)]`."""


def trees() -> Iterable[tuple[str, bool]]:
    """`(release, whether it is patched)`, in the order of the table."""
    for release in (*wheels.OLDER_RELEASES, *wheels.RELEASES):
        yield release, False
        if release in manifest.load().releases():
            yield release, True


def answer(release: str, is_patched: bool, scratch: Path) -> dict[str, Any]:
    """What `doctor --json` says. Raises `RuntimeError` with its last line where it says nothing."""
    known = manifest.load()
    files = known.files(release) if is_patched else ()
    tree = patched.copied(wheels.source(release), scratch / release, files)
    if is_patched:
        change.apply(known, tree)
    info = tree / f"sglang-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n")
    lab = install.install(LAST_RELEASE if release == LAST_RELEASE else LAB_RELEASE)
    env = cpu_env({**lab.env, "XDG_CACHE_HOME": str(scratch)})
    env["PYTHONPATH"] = os.pathsep.join([str(tree), str(ROOT), env["PYTHONPATH"]])
    command = [str(lab.python), "-m", "sglang_scaling_fixes.cli", "doctor", "--json"]
    done = subprocess.run(
        [*command, "--plugin", ",".join(FIX_NAMES)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    if found["sglang"] != release:
        raise RuntimeError(f"asked SGLang {release}, and {found['sglang']} answered")
    return found


def document(rows: Rows, date: str) -> str:
    """The whole file. `date`: the day of the answers."""
    reasons: dict[str, int] = {}
    lines = [HEAD.format(date=date), _line(["Release", "Plugin", *(f"`{n}`" for n in FIX_NAMES)])]
    lines.append(_line(["---"] * (2 + len(FIX_NAMES))))
    for name, found in rows:
        plugin = found["plugin"]
        called = "called" if plugin["loaded"] else _noted("not called", plugin["reason"], reasons)
        lines.append(_line([name, called, *_states(found, reasons)]))
    lines += ["\n## Reasons\n", _line(["", ""]), _line(["---", "---"])]
    lines += [_line([str(number), reason]) for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _states(found: Mapping[str, Any], reasons: dict[str, int]) -> list[str]:
    if not found["plugin"]["loaded"]:
        return ["–"] * len(FIX_NAMES)
    states = {fix["name"]: fix for fix in found["fixes"]}
    return [
        state["state"]
        if state["state"] != "unsupported"
        else _noted("unsupported", state["reason"], reasons)
        for state in (states[name] for name in FIX_NAMES)
    ]


def _noted(word: str, reason: str, reasons: dict[str, int]) -> str:
    return f"{word} ({reasons.setdefault(reason, len(reasons) + 1)})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    rows: Rows = []
    for release, is_patched in trees():
        name = f"{release}, patched" if is_patched else release
        with tempfile.TemporaryDirectory() as scratch:
            rows.append((name, answer(release, is_patched, Path(scratch))))
        print(f"compatibility: {name}", file=sys.stderr, flush=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    DOCUMENT.write_text(document(rows, today))
    return 0


if __name__ == "__main__":
    sys.exit(main())
