"""LayerSplit, page by page: not part of this version. Its place, and what is known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.fix import Armed, Fix

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


class LayerSplit(Fix):
    """A record only: `missing` keeps it from being armed."""

    name = "layer-split"
    default = False
    breaks = (
        "Prefill context parallelism: every rank stores every layer, or broadcasts whole pools."
    )
    how = "Owners broadcast only the pages in use, a layer ahead."
    stock = (("0.5.11", "every rank stores every layer, or (from 0.5.16) broadcasts whole pools"),)
    upstream = "sgl-project/sglang LayerSplit (in 0.5.16)"
    remove_when = "upstream filters its broadcast by page and double-buffers it"
    missing = "not part of this sglang-scaling-fixes yet"

    def arm(self, config: Config) -> Armed:
        raise AttachError(self.missing)


FIX = LayerSplit()
