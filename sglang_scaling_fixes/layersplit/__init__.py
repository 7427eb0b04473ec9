"""LayerSplit: each rank keeps some layers, and sends the pages in use to the others, just in time.

plan.py          which pages a forward pass reads, and where they lie in the scratch
schedule.py      when each layer travels
forward.py       both, for one pass: what is under way, and who waits for it
pool.py          the pool: owned layers, two scratches
pack.py, channel.py, lane.py   an owner's copy, the broadcast, and the stream on which both run
metadata.py, index_writes.py, admission.py, sharing.py, tree.py, sizing.py   where stock meets it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.fix import Armed, Fix
from sglang_scaling_fixes.layersplit import points
from sglang_scaling_fixes.layersplit.flags import SETTINGS
from sglang_scaling_fixes.layersplit.metrics import PREFILL

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


class LayerSplit(Fix):
    """A prefill's KV, split by layer over the ranks of context parallelism."""

    name = points.NAME
    default = False
    breaks = (
        "Prefill context parallelism: every rank stores every layer, or broadcasts whole pools."
    )
    how = "Owners broadcast only the pages in use, a layer ahead, into two compact scratches."
    stock = (
        ("0.5.11", "has no split: every rank stores every layer"),
        (points.FIRST, "broadcasts the whole pool of each layer, on one scratch of its size"),
    )
    unsupported = ("0.5.11",)
    upstream = "sgl-project/sglang LayerSplit (in 0.5.16), #39601 (pages in use, open)"
    remove_when = "upstream filters its broadcast by page and double-buffers it"
    settings = SETTINGS
    attach_points = points.ATTACH_POINTS
    metrics = (PREFILL,)

    def check(self, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.layersplit.server_args import check

        check(server_args)

    def arm(self, config: Config) -> Armed:
        from sglang_scaling_fixes.attach import is_wrapped, require_wrapped
        from sglang_scaling_fixes.presence import exists

        if not exists(points.MODULE):
            raise AttachError(
                f"this release has no --enable-dsa-cache-layer-split (it came with {points.FIRST}):"
                " every rank stores every layer, and decode knows of no split to pull from"
            )
        from sglang_scaling_fixes.layersplit import attach, probe

        if not is_wrapped(points.METADATA.target):
            attach.attach(config)
        require_wrapped(points.ATTACH_POINTS)
        probe.run()
        return Armed("attached and proven on this release's own pool")

    def bind(self, scheduler: Any, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.layersplit.server_args import check_in_force

        check_in_force(scheduler, server_args)

    def report(self) -> dict[str, Any] | None:
        from sglang_scaling_fixes.layersplit.report import report

        counts = report()
        return None if counts is None else {"layer_split": counts}


FIX = LayerSplit()
