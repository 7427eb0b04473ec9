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

__all__ = ["ALL", "ARMED", "RELEASES", "WheelUnavailable", "between", "source"]

ALL = (*OLDER_RELEASES, *RELEASES)
"""With those that load no plugins; oldest first."""
ARMED = ("0.5.10.post1", *RELEASES)
"""Where safe reclaim is armed. The first with the patch `plugin-loader`; so is 0.5.10, whose files
are the same in all that is read here."""

if __name__ == "__main__":
    sys.exit(main())
