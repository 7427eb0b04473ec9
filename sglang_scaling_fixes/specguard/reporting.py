"""What the guard counts and logs, and how it notifies a prefill server.

All ranks that share a request decide alike; one rank of the group reports, the others are silent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_scaling_fixes.metrics import Metrics
from sglang_scaling_fixes.specguard.detector import Anomaly
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD

logger = logging.getLogger(__name__)

ERROR_TYPE = "kv_anomaly"
Notify = Callable[[Any, Sequence[int]], None]


@dataclass
class Reporting:
    """`worker`: this server's host and port, for the log. `notify(req, tokens)` sends the
    prefill server of `req` the beginning of a suspect prompt; None where there is none."""

    worker: str = ""
    metrics: Metrics = field(default_factory=lambda: Metrics(SPEC_GUARD, None))
    notify: Notify | None = None
    is_reporting_rank: bool = True

    def increment(self, metric: str, *labels: str) -> None:
        if self.is_reporting_rank:
            self.metrics.inc(metric, *labels)

    def notify_prefill(self, req: Any, tokens: Sequence[int]) -> None:
        if self.is_reporting_rank and self.notify is not None:
            self.notify(req, tokens)

    def anomaly(self, req: Any, anomaly: Anomaly, action: str, window: int) -> None:
        """Count it and log one JSON line. `action`: aborted or observed; `window` in tokens."""
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
        logger.warning("sglang-scaling-fixes: %s", json.dumps(line))
