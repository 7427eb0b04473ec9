"""Loads and write-backs of HiCache, ordered on the streams.

    fence      load:       H2D stream waits for the forward stream, then stock starts the load
               write-back: D2H stream waits for the forward stream, then stock starts the copy
    prefetch   the broadcast of a layer waits for the load of that layer

A fence is one event wait per load, a prefetch one per layer; the host never waits, and a
forward never waits for more than the layer it is at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.attach import AttachPoint, resolve, wrap
from sglang_scaling_fixes.ordering import points
from sglang_scaling_fixes.presence import own_method

PREFETCH = points.PREFETCH.target

_FORWARD = "sglang_scaling_fixes_forward_stream"
"""Attribute of a controller that holds the forward stream its copies must follow."""

_STREAMS = {
    "start_loading": ("load_queue", "load_stream", "host_to_device_stream"),
    "start_writing": ("write_queue", "write_stream", "device_to_host_stream"),
}
"""Method -> its queue, its stream up to 0.5.17, its stream since (on the transfer engine)."""


def bind(controller: Any, forward: Any) -> None:
    """From now on this controller's copies follow what was launched on `forward`."""
    setattr(controller, _FORWARD, forward)


def bound(controller: Any) -> bool:
    return getattr(controller, _FORWARD, None) is not None


def attach_fence(point: AttachPoint) -> None:
    """Fence a controller's `start_loading` or `start_writing`."""
    queue, old, new = _STREAMS[point.target.rpartition(".")[2]]

    def start(stock: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> Any:
        forward = getattr(controller, _FORWARD, None)
        if forward is not None and getattr(controller, queue):
            engine = getattr(controller, "l2_transfer_engine", None)
            stream = getattr(controller, old) if engine is None else getattr(engine, new)
            stream.wait_stream(forward)
        return stock(controller, *args, **kwargs)

    wrap(point, start)


def stock_broadcasts() -> bool:
    """Whether split layers are broadcast by stock's pool: layer-split's orders its own."""
    target, _, method = PREFETCH.rpartition(".")
    return own_method(target, method) and resolve(target)[2].__module__ == target.partition(":")[0]


def attach_prefetch() -> None:
    """Give every prefetch of a layer's KV the counter of its load."""

    def prefetch_kv_buffer(
        stock: Callable[..., Any],
        pool: Any,
        layer_id: int,
        layer_transfer_counter: Any = None,
        layer_transfer_idx: int | None = None,
    ) -> Any:
        if layer_transfer_counter is None:
            layer_transfer_counter = pool.layer_transfer_counter
            layer_transfer_idx = layer_id - pool.start_layer
        if not waits_per_layer(layer_transfer_counter):
            return stock(pool, layer_id)
        if pool.layer_broadcast_comm is None:
            # Then stock broadcasts on the current stream and asks no counter.
            layer_transfer_counter.wait_until(layer_transfer_idx)
        return stock(pool, layer_id, layer_transfer_counter, layer_transfer_idx)

    wrap(points.PREFETCH, prefetch_kv_buffer)


def waits_per_layer(counter: Any) -> bool:
    """Whether this is HiCache's own counter: others (FlexKV, LMCache) do more than wait."""
    from sglang.srt.managers.cache_controller import LayerDoneCounter

    return isinstance(counter, LayerDoneCounter)
