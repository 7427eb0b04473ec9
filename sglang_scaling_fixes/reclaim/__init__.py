"""Safe reclaim: KV slots of a failed transfer return only with proof that no writer is left."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.fix import Armed, Fix
from sglang_scaling_fixes.reclaim import points
from sglang_scaling_fixes.reclaim.flags import SETTINGS
from sglang_scaling_fixes.reclaim.metrics import DECODE, PREFILL

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config
    from sglang_scaling_fixes.refusals import Edit

TRANSFER_TIMEOUT_S = "600"
"""Seconds a Mooncake write may take before it is given up (MC_TRANSFER_TIMEOUT).

Mooncake's own 30 s abandons a slow write while its bytes are still on the wire: the
call fails, the bytes land, and nothing can prove when they have. Waited for, the same
write ends with a status that means something. A value set by the operator stays.
"""


class SafeReclaim(Fix):
    """Slots return with proof only, on decode; prefill accounts for its writes and gives it."""

    name = points.NAME
    default = True
    breaks = (
        "Prefill/decode disaggregation: KV slots of an aborted or timed-out request are reused "
        "while prefill may still write into them."
    )
    how = "Gate at the decode allocators; slots return only with proof that no writer is left."
    stock = (
        ("0.5.11", "freed at once"),
        ("0.5.19", "30 s hold behind an environment variable, off"),
        ("0.5.21", "freed without proof after 30 s"),
    )
    upstream = "sgl-project/sglang #35049 (frees without proof after 30 s), #38961"
    remove_when = "upstream frees only on proof, retries its abort and survives room reuse"
    settings = SETTINGS
    attach_points = points.ATTACH_POINTS
    metrics = (DECODE, PREFILL)

    def check(self, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.reclaim.server_args import check

        check(server_args, fence_asked=config.fence == "always")

    def arm(self, config: Config) -> Armed:
        """Attach both roles: which one this process will have is not known yet."""
        from sglang_scaling_fixes import release
        from sglang_scaling_fixes.attach import (
            LAST_RELEASE,
            is_there,
            is_wrapped,
            present,
            require_wrapped,
        )
        from sglang_scaling_fixes.reclaim import probe
        from sglang_scaling_fixes.reclaim.decode import attach as attach_decode
        from sglang_scaling_fixes.reclaim.prefill import attach as attach_prefill

        os.environ.setdefault("MC_TRANSFER_TIMEOUT", TRANSFER_TIMEOUT_S)
        if release.mooncake_retries():  # Mooncake reads it when its first engine is made
            os.environ.setdefault(release.POSTS, "1")
        if not is_wrapped(points.TRANSFER_WORKER.target):
            attach_decode.attach(config)
            attach_prefill.attach()
        absent = {p for pair in points.ALTERNATIVES for p in pair if p != present(pair)}
        require_wrapped(
            point
            for point in points.ATTACH_POINTS
            if point not in absent and (point.last == LAST_RELEASE or is_there(point))
        )
        probe.run()
        return Armed("attached and proven on this release's own classes")

    def bind(self, scheduler: Any, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.reclaim.server_args import check_in_force

        check_in_force(scheduler)

    def report(self) -> dict[str, Any] | None:
        from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
        from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide

        sides = {
            "safe_reclaim_decode": DecodeSide.current,
            "safe_reclaim_prefill": PrefillSide.current,
        }
        return {part: side.report() for part, side in sides.items() if side is not None} or None

    def obstacle(self) -> str | None:
        """A server without disaggregation hands no slot to a remote writer, and starts."""
        from sglang_scaling_fixes import release

        problem = release.mooncake_problem(release.mooncake())
        return problem and f"no prefill or decode server over Mooncake starts: {problem}"

    def unready(self, report: Mapping[str, Any]) -> str | None:
        from sglang_scaling_fixes.reclaim.retry_after import REFUSAL

        decode = report.get("safe_reclaim_decode") or {}
        return REFUSAL if decode.get("refusing") else None

    def error_edits(self) -> Sequence[Edit]:
        from sglang_scaling_fixes.reclaim import retry_after

        return (retry_after.edit,)


FIX = SafeReclaim()
