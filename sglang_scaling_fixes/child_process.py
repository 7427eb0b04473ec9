"""Asks a Python process of its own, which prints its answer as JSON behind a mark."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sglang_scaling_fixes.errors import ScalingFixesError


class NoAnswer(ScalingFixesError):
    """The process ended without an answer. The text is the last line of its stderr."""


class NoAnswerInTime(ScalingFixesError):
    """The process did not answer within its time, and was ended."""


def ask(*arguments: str, env: Mapping[str, str], mark: str, timeout_s: float) -> Any:
    """Run this Python with `arguments` and return what its first line with `mark` says.

    `env`: the whole environment of the process. Raises `NoAnswer` or `NoAnswerInTime`.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=dict(env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NoAnswerInTime(f"no answer within {timeout_s:.0f} s") from error
    for line in done.stdout.splitlines():
        if line.startswith(mark):
            return json.loads(line.removeprefix(mark))
    raise NoAnswer((done.stderr.strip().splitlines() or ["no output"])[-1])
