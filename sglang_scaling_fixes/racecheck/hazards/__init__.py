"""The hazards, each a short scenario played with the release's own classes.

A scenario says who does what in which order on the host; whether two accesses are ordered
is what the release's own code made of it. To add one: write the function in the module of its
family, or in a new one, and add its line to `HAZARDS` there. It raises `NotThere` where the
release does not have what the hazard is about.

The scenario plays the scheduler, in the order of `Scheduler.run_batch`: loads are started on
the schedule stream, the batch's consumer index is set, the forward stream waits for the
schedule stream, the forward runs on the forward stream.
"""

from __future__ import annotations

from sglang_scaling_fixes.racecheck.hazards import (
    early_send,
    layersplit,
    loads,
    middle_chunk,
    pdmux,
    split_pool,
)
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario

__all__ = ["HAZARDS", "Hazard", "Scenario"]

HAZARDS = (
    *loads.HAZARDS,
    *layersplit.HAZARDS,
    *split_pool.HAZARDS,
    *pdmux.HAZARDS,
    *early_send.HAZARDS,
    *middle_chunk.HAZARDS,
)
"""In the order of the report."""
