"""Which part of a pool makes the gain: one part at a time given to no split, or taken from ours."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.layersplit.calibration.gain import Setting, play
from benchmarks.layersplit.calibration.workload import Sessions

PARTS: Mapping[str, tuple[str, ...]] = {
    "hits: tokens that the pool keeps": ("cached",),
    "concurrency: tokens that requests may hold": ("running",),
    "loads: layers that a rank loads": ("kept_layers",),
    "broadcast: what is exposed, batches within the scratch": ("sends", "scratch"),
}
"""By what it is, the fields of a deployment that are ours then."""


def ablation(sessions: Sessions, context: int, setting: Setting) -> dict[str, tuple[float, float]]:
    """For each part the goodput over no split's: with that part alone, and with all but it."""
    trace = sessions.kept_up(context, setting.live, setting.turns)
    deployments = setting.deployments()
    unsplit, ours = deployments["unsplit"], deployments["ours"]
    base = play(trace, unsplit, setting).goodput
    found = {}
    for part, fields in PARTS.items():
        alone = unsplit.but(**{field: getattr(ours, field) for field in fields})
        without = ours.but(**{field: getattr(unsplit, field) for field in fields})
        found[part] = (
            play(trace, alone, setting).goodput / base,
            play(trace, without, setting).goodput / base,
        )
    found["all"] = (play(trace, ours, setting).goodput / base, 1.0)
    return found
