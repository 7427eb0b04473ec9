"""Safe reclaim: KV slots of a failed transfer return only with proof that no writer is left."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config

TRANSFER_TIMEOUT = "600"
"""Seconds a Mooncake write may take before it is given up (MC_TRANSFER_TIMEOUT).

Mooncake's own 30 s abandons a slow write while its bytes are still on the wire: the
call fails, the bytes land, and nothing can prove when they have. Waited for, the same
write ends with a status that means something. A value set by the operator stays.
"""


def arm(config: Config) -> str:
    """Attach both roles, once per process, and prove them; return the proof in words.

    Raises `ScalingFixesError` when a stock part is missing or behaves differently.
    """
    os.environ.setdefault("MC_TRANSFER_TIMEOUT", TRANSFER_TIMEOUT)
    from sglang_scaling_fixes.attach import is_wrapped, require_wrapped
    from sglang_scaling_fixes.reclaim import probe
    from sglang_scaling_fixes.reclaim.decode import attach as attach_decode
    from sglang_scaling_fixes.reclaim.prefill import attach as attach_prefill

    if not is_wrapped(probe.SENTINEL):
        attach_decode.attach(config)
        attach_prefill.attach()
    require_wrapped("safe-reclaim")
    probe.run()
    return "attached and proven on this release's own classes"
