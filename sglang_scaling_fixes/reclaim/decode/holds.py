"""Saying what is held: the log, the gauges and `/server_info`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sglang_scaling_fixes.reclaim.decode.gate import Gate
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.reasons import REASONS, reason, why_held

logger = logging.getLogger(__name__)

SAY_HELD_AFTER_S = 5.0
"""Seconds an exposure is held before the log says why."""
SAY_AGAIN_S = 60.0
"""Seconds until the log says it again."""
SHOW_EVERY_S = 1.0
"""Seconds between two updates of the gauges while something is held."""


class HoldReport:
    """What one decode rank tells its operator of the slots that it withholds."""

    def __init__(self, records: Records) -> None:
        self._ledger = records.ledger
        self._lock = records.lock
        self._metrics = records.metrics
        self._next_show = 0.0
        self._tokens_max = 0

    def update(self, gate: Gate) -> None:
        """Once per tick while something is held: the log and the gauges, when they are due."""
        now = time.monotonic()
        self._tokens_max = max(self._tokens_max, gate.held_tokens)
        if now >= self._next_show:
            self._next_show = now + SHOW_EVERY_S
            self.show(gate)
        for exposure in self._ledger.held:
            due = exposure.next_log or exposure.gave_up_at + SAY_HELD_AFTER_S
            exposure.next_log = due
            if now >= due:
                exposure.next_log = now + SAY_AGAIN_S
                logger.warning(
                    "safe-reclaim: room %d held for %.0f s: %s",
                    exposure.room,
                    now - exposure.gave_up_at,
                    why_held(exposure, self._ledger.peers),
                )

    def show(self, gate: Gate) -> None:
        """Bring the gauges up to date."""
        with self._lock:
            peers = self._ledger.peers
            found = Counter(reason(exposure, peers) for exposure in self._ledger.held)
        self._metrics.set("held_tokens", gate.held_tokens)
        for known in REASONS:
            self._metrics.set("holds", found[known], known)

    def returned(self, exposure: Exposure, tokens: int) -> None:
        """The slots of `exposure` went back: `tokens` of them."""
        self._metrics.inc("returned")
        for writer in exposure.writers.values():
            if writer.proof is not None:
                self._metrics.inc("frees", writer.proof.value)
        seconds = time.monotonic() - exposure.gave_up_at
        self._metrics.observe("hold_seconds", seconds)
        logger.info(
            "safe-reclaim: room %d: %d token slots back after %.3f s, proof %s",
            exposure.room,
            tokens,
            seconds,
            ",".join(sorted({w.proof or "" for w in exposure.writers.values()})) or "P1",
        )

    def report(
        self, gate: Gate | None, *, refusing: bool, ailing: Mapping[str, str]
    ) -> dict[str, Any]:
        """Counters and holds for `/server_info` and the lab."""
        with self._lock:
            peers = self._ledger.peers
            held = [
                {"room": e.room, "state": e.state.value, "why": why_held(e, peers)}
                for e in self._ledger.held
            ]
        return {
            **self._metrics.report(),
            "held_tokens": gate.held_tokens if gate is not None else 0,
            "held_tokens_max": self._tokens_max,
            "refusing": refusing,
            "ailing": dict(ailing),
            "held": held,
            "peers": len(self._ledger.peers),
        }
