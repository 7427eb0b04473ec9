"""Is this release ordered? Asked of its own classes, before and after attaching.

Nothing here reads a version number, touches a GPU or starts a thread: the release's methods
run on bare objects whose streams, events and counters notice who waits for them before the
work begins.
"""

from __future__ import annotations

from sglang_scaling_fixes.ordering.probe.early_send import (
    batch,
    holds_back_loads,
    prefill_scheduler,
    records_event,
    run_early_sends,
    sends_early,
    waits_for_event,
)
from sglang_scaling_fixes.ordering.probe.loads import fenced, prefetch_waits
from sglang_scaling_fixes.ordering.probe.presence import exists, own_method

__all__ = [
    "batch",
    "exists",
    "fenced",
    "holds_back_loads",
    "own_method",
    "prefetch_waits",
    "prefill_scheduler",
    "records_event",
    "run_early_sends",
    "sends_early",
    "waits_for_event",
]
