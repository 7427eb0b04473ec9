"""HiCache ordering: nothing is read before it is loaded, nothing copied before it is written.

`arm` attaches what this release lacks and leaves alone what it does itself; both are found
out by the same probes, asked again after attaching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.errors import AttachError, ConfigError

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config


@dataclass(frozen=True)
class Part:
    """One wait: does the release have the code (`there`), does it `hold`, how it is attached."""

    name: str
    there: Callable[[], bool]
    holds: Callable[[], bool]
    attach: Callable[[], None]


def _parts() -> list[Part]:
    from sglang_scaling_fixes.ordering import early_send, loads, probe
    from sglang_scaling_fixes.ordering.probe.transfer import BACKENDS

    fences = [
        Part(
            f"{name} ({target.rpartition(':')[2]})",
            there=partial(probe.own_method, target, method),
            holds=partial(probe.fenced, target, method),
            attach=partial(loads.attach_fence, target, method),
        )
        for name, method in (("load fence", "start_loading"), ("write-back fence", "start_writing"))
        for target in (loads.CONTROLLER, loads.HYBRID)
    ]
    split = Part(
        "LayerSplit prefetch",
        there=lambda: probe.own_method(*loads.PREFETCH.rsplit(".", 1)),
        holds=probe.prefetch_waits,
        attach=loads.attach_prefetch,
    )
    nixl = Part(
        "early send over NIXL",
        there=lambda: probe.sends_early() and probe.records_event(),
        holds=lambda: probe.waits_for_event("nixl"),
        attach=early_send.attach_nixl,
    )

    def deaf() -> list[str]:
        return [backend for backend in BACKENDS if not probe.waits_for_event(backend)]

    rest = Part(
        "early send held back",
        there=probe.sends_early,
        holds=lambda: probe.holds_back_loads() and not deaf(),
        attach=lambda: early_send.attach_hold_back(
            loading=not probe.holds_back_loads(),
            deaf=[f"{early_send.PACKAGE}.{backend}." for backend in deaf()]
            if probe.records_event()
            else [early_send.PACKAGE],
        ),
    )
    return [*fences, split, nixl, rest]


_attached: list[str] = []
_native: list[str] = []


def arm(config: Config) -> tuple[str, bool]:
    """Attach what is missing, once per process; return the proof, and whether all is native.

    Raises `AttachError` naming the first wait that does not hold after attaching.
    """
    del config
    from sglang_scaling_fixes.ordering import loads, probe

    if not probe.exists(loads.CONTROLLER.partition(":")[0]):
        raise AttachError(f"expected {loads.CONTROLLER}")
    if not armed():
        for part in _parts():
            if not part.there():
                continue
            if part.holds():
                _native.append(part.name)
                continue
            part.attach()
            _attached.append(part.name)
    for part in _parts():
        if part.there() and not part.holds():
            raise AttachError(f"probe: {part.name} does not hold")
    if not _attached:
        return f"this release does all of it: {', '.join(_native)}", True
    native = f"; native: {', '.join(_native)}" if _native else ""
    return f"attached and proven: {', '.join(_attached)}{native}", False


def armed() -> bool:
    """Whether `arm` has been here."""
    return bool(_attached or _native)


def binds_streams() -> bool:
    """Whether this process added a fence, which needs to be told the forward stream."""
    return any("fence" in name for name in _attached)


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
