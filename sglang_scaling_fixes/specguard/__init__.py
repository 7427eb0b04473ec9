"""The anomaly guard: generations whose speculative decoding betrays a corrupted KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


def arm(config: Config) -> str:
    """Attach, once per process, and prove it on this release's own classes.

    Raises `ScalingFixesError` when a stock part is missing or behaves differently.
    """
    from sglang_scaling_fixes.attach import ATTACH_POINTS, AttachPoint, is_wrapped
    from sglang_scaling_fixes.errors import AttachError
    from sglang_scaling_fixes.specguard import attach, probe

    attach.attach()

    def ours(point: AttachPoint) -> bool:
        other_finish = point.target in attach.FINISH and point.target != attach.finish_target()
        return point.fix == "spec-guard" and point.wrapped and not other_finish

    for point in filter(ours, ATTACH_POINTS):
        if not is_wrapped(point.target):
            raise AttachError(f"{point.target} is not wrapped")
    probe.run()
    return f"{config.guard}: attached and proven on this release's own classes"
