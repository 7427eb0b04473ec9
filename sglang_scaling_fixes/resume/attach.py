"""Attaches resume to stock, in the main process and in schedulers alike."""

from __future__ import annotations

from typing import Any

from sglang_scaling_fixes import attach as places
from sglang_scaling_fixes import metrics
from sglang_scaling_fixes.attach import AttachPoint, is_wrapped, present, wrap
from sglang_scaling_fixes.resume import points, requests, serving
from sglang_scaling_fixes.resume.metrics import RESUME

STREAM = (points.STREAM, points.STREAM_BEFORE)


def stream_point() -> AttachPoint:
    """The one of `STREAM` that this release has."""
    return present(STREAM)


def attach() -> None:
    """Once per process. Without the field in a request every wrapper only calls stock."""
    if is_wrapped(points.QUEUED.target):
        return
    wrap(points.QUEUED, requests.queued)
    wrap(points.GRAMMAR_READY, requests.grammar_ready)
    wrap(points.SAMPLING, requests.sampling)
    wrap(points.PREBUILT, requests.arrived)
    wrap(stream_point(), requests.stream)
    wrap(points.GENERATE, serving.generate)
    wrap(points.TOKENIZED, serving.tokenized)
    wrap(points.OUTPUT, serving.output)


def require_wrapped() -> None:
    """Raises `AttachError` naming a place that does not run through our wrapper."""
    (absent,) = (point for point in STREAM if point != stream_point())
    places.require_wrapped(point for point in points.ATTACH_POINTS if point != absent)


def bind(scheduler: Any, server_args: Any) -> None:
    """After stock built its scheduler: what is counted here."""
    role = str(getattr(server_args, "disaggregation_mode", "null"))
    places.require_in_place(points.NAME, role, "both")
    requests.counts = requests.Counts(
        metrics.of_scheduler(RESUME, scheduler, server_args), metrics.is_reporting_rank(scheduler)
    )
