"""Results as one JSON file per release, and as tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save(path: Path, release: str, part: str, result: dict[str, Any]) -> None:
    """Put one benchmark's result into the file, beside what the others left there."""
    found = json.loads(path.read_text()) if path.exists() else {"release": release}
    if found.get("release") != release:
        raise ValueError(f"{path} holds results of SGLang {found.get('release')}, not {release}")
    found[part] = {"machine": machine(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures depend on, without a name."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: columns of equal width, to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """For a document."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
