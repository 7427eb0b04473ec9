"""HiCache ordering: nothing is read before it is loaded, nothing copied before it is written.

`arm` attaches what this release lacks and leaves alone what it does itself; both are found
out by the same probes, asked again after attaching.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.attach import AttachPoint, is_there
from sglang_scaling_fixes.errors import AttachError, ConfigError
from sglang_scaling_fixes.fix import Armed, Fix, Native
from sglang_scaling_fixes.ordering import points
from sglang_scaling_fixes.parts import Part, Parts

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


def _cannot_attach() -> None:
    raise AttachError(
        "this release reads index-K before its load, and nothing attaches to that; apply the "
        "patch for it: sglang-scaling-fixes patch apply index-k-wait"
    )


def _parts() -> list[Part]:
    from sglang_scaling_fixes.ordering import loads, probe
    from sglang_scaling_fixes.presence import own_method

    def fence(name: str, point: AttachPoint) -> Part:
        controller, _, method = point.target.rpartition(".")
        return Part(
            f"{name} ({controller.rpartition(':')[2]})",
            there=partial(own_method, controller, method),
            holds=partial(probe.fenced, controller, method),
            attach=partial(loads.attach_fence, point),
        )

    fences = [
        fence("load fence", points.START_LOADING),
        fence("load fence", points.HYBRID_START_LOADING),
        fence("write-back fence", points.START_WRITING),
        fence("write-back fence", points.HYBRID_START_WRITING),
    ]
    split = Part(
        "LayerSplit prefetch",
        there=loads.stock_broadcasts,
        holds=probe.prefetch_waits,
        attach=loads.attach_prefetch,
    )
    index_k = Part(
        "index-K wait",
        there=partial(is_there, points.INDEX_K[0]),
        holds=probe.index_k_waits,
        attach=_cannot_attach,
    )
    return [index_k, *fences, split]


_PARTS = Parts(_parts, "this release has no HiCache")


def armed() -> bool:
    """Whether `HiCacheOrdering.arm` has been here."""
    return _PARTS.armed


def binds_streams() -> bool:
    """Whether this process added a fence, which needs to be told the forward stream."""
    return any("fence" in name for name in _PARTS.attached)


def bind(scheduler: Any) -> None:
    """After stock built its scheduler: tell its HiCache controller the forward stream.

    Raises `ConfigError` if there is a controller and no forward stream to be found.
    """
    from sglang_scaling_fixes.ordering import loads

    controller = getattr(getattr(scheduler, "tree_cache", None), "cache_controller", None)
    if controller is None or not binds_streams():
        return
    runner = getattr(scheduler.tp_worker, "model_runner", None)
    forward = getattr(runner, "forward_stream", None)
    if forward is None:
        raise ConfigError("this scheduler has a HiCache controller and no forward stream")
    loads.bind(controller, forward)


def check(server_args: Any) -> None:
    """Raise `ConfigError` for a server whose order cannot be kept."""
    if getattr(server_args, "enable_pdmux", False) and getattr(
        server_args, "enable_hierarchical_cache", False
    ):
        raise ConfigError(
            "--enable-pdmux with --enable-hierarchical-cache: split prefills never wait for "
            "their loads and run on streams of their own; drop one of the two, or start "
            "without hicache-ordering"
        )


class HiCacheOrdering(Fix):
    """The waits of `_parts`, as one fix: native where the release has all of them."""

    name = points.NAME
    default = False
    breaks = (
        "HiCache: KV is read or broadcast before it is loaded, or copied while a forward still "
        "writes it."
    )
    how = "Waits on the streams, per layer or per copy, where a probe finds them missing."
    stock = (
        ("0.5.11", "no fences (and from 0.5.16 unordered LayerSplit prefetch)"),
        ("0.5.19", "load fence only"),
        ("0.5.23", "both fences; LayerSplit prefetch unordered"),
    )
    upstream = (
        "sgl-project/sglang #22811 (accessors, in 0.5.11), #36738 (load fence, in 0.5.19), #39417"
    )
    remove_when = "upstream's LayerSplit prefetch waits for the load"
    attach_points = points.ATTACH_POINTS

    def check(self, server_args: Any, config: Config) -> None:
        check(server_args)

    def arm(self, config: Config) -> Armed | Native:
        """Attach what is missing. `AttachError` names the first wait that does not hold then."""
        from sglang_scaling_fixes.presence import exists

        if not exists(points.CONTROLLER.partition(":")[0]):
            raise AttachError(f"expected {points.CONTROLLER}")
        return _PARTS.arm()

    def bind(self, scheduler: Any, server_args: Any, config: Config) -> None:
        bind(scheduler)


FIX = HiCacheOrdering()
