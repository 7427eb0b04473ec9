"""A script in a Python process of its own, and the JSON it prints behind a mark."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def said(
    python: str | Path, script: str, *argv: str, env: Mapping[str, str], mark: str, timeout_s: float
) -> Any:
    """What the first line that opens with `mark` says; without one the test fails with stderr."""
    done = subprocess.run(
        [str(python), "-c", script, *argv],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(mark)]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix(mark))
