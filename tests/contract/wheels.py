"""The stock wheels the contract tests read; as a script, fetch them all."""

from __future__ import annotations

import sys

from sglang_scaling_fixes.lab.wheels import (
    OLDER_RELEASES,
    RELEASES,
    WheelUnavailable,
    between,
    main,
    source,
)

__all__ = ["ALL", "RELEASES", "WheelUnavailable", "between", "source"]

ALL = (*OLDER_RELEASES, *RELEASES)
"""With those that load no plugins; oldest first."""

if __name__ == "__main__":
    sys.exit(main())
