"""The anomaly guard: generations whose speculative decoding betrays a corrupted KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


def arm(config: Config) -> str:
    """Attach, once per process, and prove it on this release's own classes.

    Raises `ScalingFixesError` when a stock part is missing or behaves differently.
    """
    from sglang_scaling_fixes.attach import require_wrapped
    from sglang_scaling_fixes.specguard import attach, probe

    attach.attach()
    (other,) = (target for target in attach.FINISH if target != attach.finish_target())
    require_wrapped("spec-guard", absent=other)
    probe.run()
    return f"{config.guard}: attached and proven on this release's own classes"
