"""What a hold waits for, in words for the operator."""

from __future__ import annotations

from collections.abc import Collection

from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.types import Rank

REASONS = ("no answer yet", "write of unknown end", "no safe-reclaim", "other TP ranks")
"""What a hold can wait for, in few words (`reason`)."""


def reason(exposure: Exposure, peers: Collection[Rank]) -> str:
    """What this exposure waits for, as one of `REASONS`. `peers`: ranks with safe reclaim."""
    unproven = exposure.unproven
    if not unproven:
        return "other TP ranks"
    if any(writer.stuck for writer in unproven):
        return "write of unknown end"
    silent = any(writer.rank not in peers for writer in unproven)
    return "no safe-reclaim" if silent else "no answer yet"


def why_held(exposure: Exposure, peers: Collection[Rank]) -> str:
    """One line for the operator: what this exposure waits for."""
    if not exposure.unproven:
        return "proven on this rank; waiting for the other TP ranks"
    parts = []
    for writer in exposure.unproven:
        if writer.stuck:
            parts.append(f"{writer.rank}: {writer.stuck}")
        elif writer.rank not in peers:
            parts.append(f"{writer.rank}: runs without safe-reclaim, cannot be asked")
        else:
            parts.append(f"{writer.rank}: asked {writer.aborts} times, no answer yet")
    return "; ".join(parts)
