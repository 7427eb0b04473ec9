"""The stock wheels the contract tests read; as a script, fetch them all."""

from __future__ import annotations

import sys

from sglang_scaling_fixes.lab.wheels import RELEASES, WheelUnavailable, between, main, source

__all__ = ["RELEASES", "WheelUnavailable", "between", "source"]

if __name__ == "__main__":
    sys.exit(main())
