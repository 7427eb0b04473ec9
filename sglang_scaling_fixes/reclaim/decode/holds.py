"""Saying what is held: the log, the gauges and `/server_info`. By what it waits for, not room by
room: a prefill that falls silent leaves thousands of holds, and all of them say the same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from sglang_scaling_fixes.reclaim.decode.gate import Gate
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.rules.causes import Cause
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.reasons import REASONS, brief, reason, why_all, why_held

logger = logging.getLogger(__name__)

SAY_HELD_AFTER_S = 5.0
"""Seconds an exposure is held before the log says why."""
SAY_AGAIN_S = 60.0
"""Seconds until the log says it again."""
SHOW_EVERY_S = 1.0
"""Seconds between two looks at what is to be said, while something is held."""
MOST_LINES = 16
"""Lines of the log each time; the causes past them are counted."""
MOST_SHOWN = 32
"""Causes, and oldest holds, in `/server_info`."""


class HoldReport:
    """What one decode rank tells its operator of the slots that it withholds."""

    def __init__(self, records: Records) -> None:
        self._ledger = records.ledger
        self._lock = records.lock
        self._metrics = records.metrics
        self._next_show = 0.0
        self._tokens_max = 0
        self._next_said: dict[tuple[Any, ...], float] = {}
        """What is waited for -> when the log says it next."""

    def update(self, gate: Gate) -> None:
        """Once per tick while something is held: the log and the gauges, when they are due."""
        self._tokens_max = max(self._tokens_max, gate.held_tokens)
        now = time.monotonic()
        if now < self._next_show:
            return
        self._next_show = now + SHOW_EVERY_S
        causes = self.show(gate)
        self._next_said = {waits: due for waits, due in self._next_said.items() if due > now}
        due = [
            cause
            for cause in causes
            if now - cause.oldest.gave_up_at >= SAY_HELD_AFTER_S
            and cause.waits not in self._next_said
        ]
        self._next_said |= dict.fromkeys((cause.waits for cause in due), now + SAY_AGAIN_S)
        self._say(sorted(due, key=lambda cause: -len(cause.held)), now)

    def _say(self, causes: Sequence[Cause], now: float) -> None:
        for cause in causes[:MOST_LINES]:
            logger.warning(
                "safe-reclaim: held: %s, %d token slots, for up to %.0f s (room %d): %s",
                _rooms(len(cause.held)),
                cause.tokens,
                now - cause.oldest.gave_up_at,
                cause.oldest.room,
                why_all(cause, self._ledger.peers, now),
            )
        if rest := causes[MOST_LINES:]:
            logger.warning(
                "safe-reclaim: held besides: %s, for %d other causes: see /server_info",
                _rooms(sum(len(cause.held) for cause in rest)),
                len(rest),
            )

    def show(self, gate: Gate) -> list[Cause]:
        """Bring the gauges up to date. Returns what is held, by what it waits for."""
        found: Counter[str] = Counter()
        with self._lock:
            causes = self._ledger.causes
            for cause in causes:
                found[reason(cause.waits, self._ledger.peers)] += len(cause.held)
        self._metrics.set("held_tokens", gate.held_tokens)
        for known in REASONS:
            self._metrics.set("holds", found[known], known)
        return causes

    def returned(self, back: Sequence[tuple[Exposure, int, int]]) -> None:
        """Proof has come on every TP rank for these exposures: for each the token slots that went
        back, and those that stock itself still holds, to free them in its own time.
        """
        now = time.monotonic()
        proofs = Counter(
            writer.proof.value
            for exposure, _, _ in back
            for writer in exposure.writers.values()
            if writer.proof is not None
        )
        for proof, count in proofs.items():
            self._metrics.inc("frees", proof, by=count)
        self._metrics.inc("returned", by=len(back))
        for exposure, _, _ in back:
            self._metrics.observe("hold_seconds", now - exposure.gave_up_at)
        for exposure, tokens, still in back[:MOST_LINES]:
            logger.info(
                "safe-reclaim: room %d: %s after %.3f s, proof %s%s",
                exposure.room,
                f"{tokens} token slots back" if tokens or not still else "proven",
                now - exposure.gave_up_at,
                ",".join(sorted({w.proof or "" for w in exposure.writers.values()})) or "P1",
                f"; stock still holds {still} token slots" if still else "",
            )
        if rest := back[MOST_LINES:]:
            logger.info(
                "safe-reclaim: %s besides: %d token slots back; stock still holds %d",
                _rooms(len(rest)),
                sum(tokens for _, tokens, _ in rest),
                sum(still for _, _, still in rest),
            )

    def report(
        self, gate: Gate | None, *, refusing: bool, ailing: Mapping[str, str]
    ) -> dict[str, Any]:
        """Counters and holds for `/server_info` and the lab: the oldest holds one by one, all of
        them by what they wait for.
        """
        now = time.monotonic()
        with self._lock:
            peers = self._ledger.peers
            causes = self._ledger.causes
            oldest = [
                {"room": e.room, "state": e.state.value, "why": why_held(e, peers)}
                for e in islice(self._ledger.held, MOST_SHOWN)
            ]
            by_cause = [
                {
                    "rooms": len(cause.held),
                    "tokens": cause.tokens,
                    "oldest_s": round(now - cause.oldest.gave_up_at, 1),
                    "reason": reason(cause.waits, peers),
                    "waits_for": brief(cause.ranks),
                }
                for cause in sorted(causes, key=lambda c: -len(c.held))[:MOST_SHOWN]
            ]
        return {
            **self._metrics.report(),
            "held_tokens": gate.held_tokens if gate is not None else 0,
            "held_tokens_max": self._tokens_max,
            "refusing": refusing,
            "ailing": dict(ailing),
            "held_rooms": sum(len(cause.held) for cause in causes),
            "held": oldest,
            "held_by_cause": by_cause,
            "peers": len(peers),
        }


def _rooms(count: int) -> str:
    return f"{count} room{'s' * (count != 1)}"
