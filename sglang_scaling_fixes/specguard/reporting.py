"""What the guard counts and logs, and how it notifies a prefill server.

All ranks that share a request decide alike; one rank of the group reports, the others are silent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_scaling_fixes.metrics import Metrics
from sglang_scaling_fixes.specguard.abort import ERROR_TYPE
from sglang_scaling_fixes.specguard.baseline import Baseline
from sglang_scaling_fixes.specguard.detector import Anomaly
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD

logger = logging.getLogger(__name__)


class Prefill(Protocol):
    """How the prefill servers of a decode server are told."""

    def accuse(self, req: Any, name: int) -> None: ...

    def withdraw(self, name: int) -> None: ...


@dataclass
class Reporting:
    """`worker`: this server's host and port, for the log. `prefill`: None where there is none."""

    worker: str = ""
    metrics: Metrics = field(default_factory=lambda: Metrics(SPEC_GUARD, None))
    prefill: Prefill | None = None
    is_reporting_rank: bool = True
    _declined: bool = False

    def increment(self, metric: str, *labels: str) -> None:
        if self.is_reporting_rank:
            self.metrics.inc(metric, *labels)

    def suspicions(self, count: int) -> None:
        if self.is_reporting_rank:
            self.metrics.set("suspicions", count)

    def accuse_prefill(self, req: Any, name: int) -> None:
        if self.is_reporting_rank and self.prefill is not None:
            self.prefill.accuse(req, name)

    def withdraw_at_prefill(self, name: int) -> None:
        if self.is_reporting_rank and self.prefill is not None:
            self.prefill.withdraw(name)

    def baseline(self, baseline: Baseline) -> None:
        """It has new figures."""
        if not self.is_reporting_rank or baseline.recent is None or baseline.reference is None:
            return
        self.metrics.set("accept_length", baseline.recent, "recent")
        self.metrics.set("accept_length", baseline.reference, "reference")
        if baseline.declined and not self._declined:
            self.metrics.inc("accept_length_declines")
            figures = {"recent": baseline.recent, "reference": baseline.reference}
            self._log({"event": "accept_length_declined", "worker": self.worker, **figures})
        self._declined = baseline.declined

    def anomaly(self, req: Any, anomaly: Anomaly, action: str, window: int) -> None:
        """Count it and log one JSON line. `action`: aborted, observed or false_alarm; `window` in
        tokens."""
        if not self.is_reporting_rank:
            return
        self.metrics.inc("anomalies", anomaly.kind, action)
        self.metrics.observe("detection_tokens", anomaly.tokens)
        line = {
            "event": ERROR_TYPE,
            "action": action,
            "rid": req.rid,
            "room": getattr(req, "bootstrap_room", None),
            "worker": self.worker,
            "prompt_tokens": len(req.origin_input_ids),
            "cached_tokens": getattr(req, "cached_tokens", None),
            "output_tokens": len(req.output_ids),
            **anomaly.as_dict(),
            "window_tokens": window,
        }
        self._log(line)

    def _log(self, line: Mapping[str, Any]) -> None:
        logger.warning("sglang-scaling-fixes: %s", json.dumps(line))
