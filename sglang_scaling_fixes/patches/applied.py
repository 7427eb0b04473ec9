"""What an `sglang` says of itself: which patches it has, rightly or not.

A sentinel names its patch and the files it checks, so this needs no manifest that knows the tree.
"""

from __future__ import annotations

import os
from pathlib import Path

from sglang_scaling_fixes.patches import change, manifest, sentinel
from sglang_scaling_fixes.patches.tree import sha256

WRONGLY = "applied wrongly, SGLang cannot be imported"
INTERRUPTED = "partial: run `sglang-scaling-fixes patch revert`"


def state(release: str, source: Path) -> list[dict[str, str]]:
    """`[{"name", "state"}]` of every patch that the package below `source` has, or could have.

    `release`: what is installed there. A state is `applied`, `not applied`, `WRONGLY` or
    `INTERRUPTED`.
    """
    found = _sealed(source)
    for patch in manifest.load().series(release):
        found.setdefault(patch.name, "not applied")
    if change.interrupted(source):
        found = dict.fromkeys(found, INTERRUPTED)
    return [{"name": name, "state": found[name]} for name in sorted(found)]


def _sealed(source: Path) -> dict[str, str]:
    srt = source / "sglang" / "srt"
    found = {}
    for file in (srt / "__init__.py", *srt.glob("*/__init__.py")):
        told = sentinel.read(file.read_text()) if file.is_file() else None
        if told is not None:
            right = all(
                _digest(file.parent / name) in digests for name, digests in told["_FILES"].items()
            )
            found[str(told["_NAME"])] = "applied" if right else WRONGLY
    return found


def _digest(file: Path) -> str | None:
    return sha256(file.read_bytes()) if os.path.isfile(file) else None
