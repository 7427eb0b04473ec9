"""Do this release's loads, write-backs and LayerSplit prefetches wait?

Nothing here reads a version number, touches a GPU or starts a thread: the release's methods
run on bare objects whose streams, events and counters notice who waits for them before the
work begins.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang_scaling_fixes import scheduler_statements
from sglang_scaling_fixes.attach import is_wrapped, resolve
from sglang_scaling_fixes.ordering import loads, points
from sglang_scaling_fixes.presence import own_method
from sglang_scaling_fixes.standin_objects import Anything, Lenient


class _Started(Exception):
    """The copy was started."""


def fenced(target: str, method: str) -> bool:
    """Does `method` of the controller at `target` wait for the forward stream before it copies?

    The stream is handed over as the release's scheduler does, and as our `bind` does.
    """
    cls: Any = resolve(f"{target}.{method}")[0]
    forward = object()
    waited: list[Any] = []

    class Copies(Anything):
        def wait_stream(self, stream: Any) -> None:
            waited.append(stream)

        def start(self, *_args: Any, **_kwargs: Any) -> Any:
            raise _Started

        __enter__ = submit_host_to_device = submit_device_to_host = start

    class Bare(Lenient, cls):  # type: ignore[misc]
        def move_indices(self, *_args: Any, **_kwargs: Any) -> Any:
            return Anything(), Anything()

        def _indices(self, *_args: Any, **_kwargs: Any) -> Any:
            return Anything(), Anything(), None

        _move_op_indices = _move_write_operation = move_hybrid_indices = _indices

    copies = Copies()
    vars(copies).update(host_to_device_stream=copies, device_to_host_stream=copies)
    controller: Any = Bare(
        load_queue=[Anything()],
        write_queue=[Anything()],
        layer_done_counter=SimpleNamespace(update_producer=lambda: 0, events=[Anything()]),
        load_stream=copies,
        write_stream=copies,
    )
    if own_method("sglang.srt.mem_cache.l2_transfer:L2TransferEngine", "submit_host_to_device"):
        controller.l2_transfer_engine = copies
    hand_over_streams(controller, forward)
    if is_wrapped(f"{target}.{method}"):
        loads.bind(controller, forward)
    streams = SimpleNamespace(Event=Anything, stream=lambda stream: stream)
    module = importlib.import_module(cls.__module__)
    # Whatever a bare object lacks ends the call as well: what counts is who was waited for.
    with (
        mock.patch.object(module, "device_module", streams, create=True),
        contextlib.suppress(Exception),
    ):
        getattr(controller, method)()
    return waited == [forward]


def hand_over_streams(controller: Any, forward: Any) -> None:
    """Let the release's scheduler give its forward stream to the controller, if it does."""
    this = Lenient(
        enable_hierarchical_cache=True,
        tree_cache=SimpleNamespace(cache_controller=controller),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(forward_stream=forward)),
        forward_stream=forward,
    )
    scheduler_statements.run(_hands_over, self=this)


def _hands_over(node: ast.If) -> bool:
    return any(
        isinstance(target, ast.Attribute) and target.attr.endswith("_fence_stream")
        for child in ast.walk(node)
        if isinstance(child, ast.Assign)
        for target in child.targets
    )


def index_k_waits() -> bool:
    """Do the readers of index-K wait for the load of their layer before they take the buffer?"""
    waited: list[int] = []
    in_time: list[bool] = []

    class Buffers:
        def __getitem__(self, layer: int) -> Any:
            in_time.append(waited == [layer])
            return Anything()

    for point in points.INDEX_K:
        cls, reader, method = resolve(point.target)
        others = list(inspect.signature(method).parameters)[2:]  # behind self and layer_id

        class Bare(Lenient, cls):  # type: ignore[misc, valid-type]
            pass

        pool: Any = Bare(
            start_layer=4,
            index_k_with_scale_buffer=Buffers(),
            layer_transfer_counter=SimpleNamespace(wait_until=waited.append),
        )
        waited.clear()
        module = importlib.import_module(cls.__module__)
        # What is done with the buffer then does not matter, and takes a real one.
        with (
            mock.patch.object(module, "index_buf_accessor", Anything(), create=True),
            contextlib.suppress(Exception),
        ):
            getattr(pool, reader)(7, **dict.fromkeys(others, Anything()))
    return in_time == [True] * len(points.INDEX_K)


def prefetch_waits() -> bool:
    """Does the broadcast of a layer wait for the load of that layer, on either communicator?"""
    cls: Any = resolve(loads.PREFETCH)[0]
    from sglang.srt.managers.cache_controller import LayerDoneCounter

    waited: list[int] = []

    class Counter(LayerDoneCounter):  # type: ignore[misc]
        def wait_until(self, threshold: int) -> None:
            waited.append(threshold)

    in_time: list[bool] = []
    for communicator in (Anything(), None):

        class Bare(Lenient, cls):  # type: ignore[misc]
            def _is_layer_owned(self, _layer_id: int) -> bool:
                return True

            def _broadcast_tensor_from_owner(self, *_args: Any, **_kwargs: Any) -> None:
                in_time.append(waited == [3])

        waited.clear()
        Bare(
            start_layer=4,
            kv_buffer=[None] * 8,
            layer_broadcast_comm=communicator,
            layer_transfer_counter=Counter.__new__(Counter),
            kv_broadcast_stream=Anything(),
            device_module=Anything(),
        ).prefetch_kv_buffer(7)
    return in_time == [True, True]
