"""Early-send ordering: a cached prefix is sent only once its pages are written.

It is free of the risks that only a GPU can show: it launches nothing, and no stream waits. It
keeps a send back, or lets NIXL's worker thread wait as stock's own Mooncake worker does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.early_send_ordering import points
from sglang_scaling_fixes.fix import Armed, Fix, Native
from sglang_scaling_fixes.parts import Part, Parts

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


logger = logging.getLogger(__name__)

UNORDERED_PIPELINE = (
    "--pp-async-batch-depth above 0: the last pipeline stage sends a chunk of a chunked prefill "
    "while its forward may still write it, which nothing here orders; set it to 0"
)


def _parts() -> list[Part]:
    from sglang_scaling_fixes.early_send_ordering import probe, sends
    from sglang_scaling_fixes.early_send_ordering.transfer import BACKENDS

    nixl = Part(
        "early send over NIXL",
        there=lambda: probe.sends_early() and probe.records_event(),
        holds=lambda: probe.waits_for_event("nixl"),
        attach=sends.attach_nixl,
    )

    def deaf() -> list[str]:
        return [backend for backend in BACKENDS if not probe.waits_for_event(backend)]

    rest = Part(
        "early send held back",
        there=probe.sends_early,
        holds=lambda: probe.holds_back_loads() and not deaf(),
        attach=lambda: sends.attach_hold_back(
            loading=not probe.holds_back_loads(),
            deaf=[f"{sends.PACKAGE}.{backend}." for backend in deaf()]
            if probe.records_event()
            else [sends.PACKAGE],
        ),
    )
    return [nixl, rest]


class EarlySendOrdering(Fix):
    """A prefill's early sends, ordered; native where the release orders them or has none."""

    name = points.NAME
    default = True
    breaks = (
        "Prefill/decode disaggregation: a cached prefix, or the chunk before, is sent while a "
        "forward or a load still writes it. On by default in stock, with and without HiCache."
    )
    how = (
        "Sends nothing early through a backend that cannot wait, nor while a load is under way; "
        "the ordinary send covers it. NIXL waits for the event that stock records."
    )
    stock = (
        ("0.5.11", "sends nothing early"),
        ("0.5.15", "unordered early sends"),
        ("0.5.22", "Mooncake's wait for the forward, NIXL's and those of loads do not"),
        ("0.5.23", "only NIXL's do not wait"),
    )
    native = ("0.5.11",)
    upstream = "sgl-project/sglang #29316 (early sends, in 0.5.15), #33970 (the race)"
    remove_when = "upstream's NIXL waits for the forward as its Mooncake does"
    attach_points = points.ATTACH_POINTS

    def __init__(self) -> None:
        self.parts = Parts(_parts, "this release sends no cached prefix early")

    def arm(self, config: Config) -> Armed | Native:
        return self.parts.arm()

    def bind(self, scheduler: Any, server_args: Any, config: Config) -> None:
        """What only a prefill needs comes off elsewhere, unless the role may still change."""
        from sglang_scaling_fixes.attach import require_in_place, unwrap_other_roles

        role = scheduler.disaggregation_mode.value
        require_in_place(points.NAME, role)
        if role == "prefill" and getattr(server_args, "pp_async_batch_depth", 0):
            logger.warning("%s: %s", points.NAME, UNORDERED_PIPELINE)
        if not getattr(server_args, "enable_pd_role_switch", False):
            unwrap_other_roles(points.NAME, role)


FIX = EarlySendOrdering()
