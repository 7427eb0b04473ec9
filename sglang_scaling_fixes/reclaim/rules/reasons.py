"""What a hold waits for, and how that ends, in words for the operator."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby

from sglang_scaling_fixes.reclaim.rules.causes import Cause, Wait
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, Writer
from sglang_scaling_fixes.reclaim.rules.types import Rank

REMEDIES = {
    "no answer yet": "when it answers; where its process is gone, by a fence",
    "write of unknown end": "by a fence (--safe-reclaim-fence), or a restart of this decode",
    "no safe-reclaim": "with its success, or by a fence; start that prefill with --plugin",
    "other TP ranks": "when they have proof",
}
"""What a hold can wait for, in few words (`reason`), and how it ends."""
REASONS = tuple(REMEDIES)


def reason(waits: Collection[Wait], peers: Collection[Rank]) -> str:
    """What waits so, as one of `REASONS`. `peers`: ranks with safe reclaim."""
    if not waits:
        return "other TP ranks"
    if any(wait.stuck for wait in waits):
        return "write of unknown end"
    silent = any(wait.rank not in peers for wait in waits)
    return "no safe-reclaim" if silent else "no answer yet"


def why_held(exposure: Exposure, peers: Collection[Rank]) -> str:
    """What this exposure waits for, writer by writer."""
    if not exposure.unproven:
        return "proven on this rank; waiting for the other TP ranks"
    return "; ".join(f"{w.rank}: {_why(w, peers)}" for w in exposure.unproven)


def _why(writer: Writer, peers: Collection[Rank]) -> str:
    if writer.stuck:
        return writer.stuck
    if writer.rank not in peers:
        return "runs without safe-reclaim, cannot be asked"
    if not writer.aborts:
        return "not asked yet (rank silent)"
    return f"asked {writer.aborts} times, no answer yet"


def why_all(cause: Cause, peers: Collection[Rank], now: float) -> str:
    """What all that is held for one cause waits for, and how it ends."""
    what = reason(cause.waits, peers)
    if not cause.waits:
        return f"proven on this rank; wait for the other TP ranks; it ends {REMEDIES[what]}"
    oldest = cause.oldest
    said = [(_why_silent(cause, w, peers, now), w.rank) for w in oldest.unproven]
    parts = [
        f"{brief([rank for _, rank in ranks])}: {why}"
        for why, ranks in groupby(said, key=lambda pair: pair[0])
    ]
    return f"wait for {'; '.join(parts)}; it ends {REMEDIES[what]}"


def _why_silent(cause: Cause, writer: Writer, peers: Collection[Rank], now: float) -> str:
    """As `_why`, for all that is held for this cause."""
    if writer.stuck or writer.rank not in peers:
        return _why(writer, peers)
    unasked = sum(not exposure.writers[writer.rank].aborts for exposure in cause.held)
    rest = f", {unasked} of them not asked yet (rank silent)" if unasked else ""
    return f"no answer for {now - cause.oldest.gave_up_at:.0f} s{rest}"


def brief(ranks: Collection[Rank]) -> str:
    """Ranks (`"ip:port"`), each host named once."""
    by_host = groupby(ranks, key=lambda rank: rank.rpartition(":")[0])
    return ", ".join(
        f"{host}:{','.join(rank.rpartition(':')[2] for rank in on_host)}"
        for host, on_host in by_host
    )
