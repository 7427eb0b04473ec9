"""The waits themselves, on stand-ins: who waits for what, and when nothing is added."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes import ordering
from sglang_scaling_fixes.attach import AttachPoint
from sglang_scaling_fixes.early_send_ordering import sends
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.ordering import loads


class Stream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, stream: Any) -> None:
        self.waited.append(stream)


STOCK = """
class Controller:
    def start_loading(self): return ("loading", len(self.load_queue))
    def start_writing(self): return ("writing", len(self.write_queue))
"""


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("stock_controller")
    exec(STOCK, module.__dict__)
    monkeypatch.setitem(sys.modules, "stock_controller", module)
    return module


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("start_loading", ("load_queue", "load_stream", "host_to_device_stream")),
        ("start_writing", ("write_queue", "write_stream", "device_to_host_stream")),
    ],
)
def test_copies_wait_for_the_forward_stream(
    stock: Any, method: str, names: tuple[str, str, str], engine: bool
) -> None:
    queue, old, new = names
    loads.attach_fence(AttachPoint("fix", "both", f"stock_controller:Controller.{method}"))
    controller, copies, forward = stock.Controller(), Stream(), object()
    setattr(controller, queue, [1])
    if engine:
        controller.l2_transfer_engine = SimpleNamespace(**{new: copies})
    else:
        setattr(controller, old, copies)
    assert getattr(controller, method)() == (method.removeprefix("start_"), 1)
    assert copies.waited == []  # not told the forward stream: nothing to wait for
    loads.bind(controller, forward)
    getattr(controller, method)()
    assert copies.waited == [forward]
    getattr(controller, queue).clear()
    getattr(controller, method)()
    assert copies.waited == [forward]  # nothing to copy, nothing to wait for


class Queue:
    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, chunk: Any) -> None:
        self.items.append(chunk)

    def get(self) -> Any:
        return self.items.pop(0)


def test_an_event_travels_with_its_chunk_and_is_waited_for_once() -> None:
    waited: list[str] = []
    queue = Queue()
    event = SimpleNamespace(synchronize=lambda: waited.append("event"))
    marked, plain = SimpleNamespace(), SimpleNamespace()
    sends._Marking(queue, event).put(marked)
    queue.put(plain)
    taken = sends._Waiting(queue)
    assert waited == []
    assert taken.get() is marked
    assert waited == ["event"]
    assert taken.get() is plain
    queue.put(marked)  # stock may put a chunk back
    assert taken.get() is marked
    assert waited == ["event"]


@pytest.mark.parametrize(
    ("pdmux", "hicache", "refused"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_pd_multiplexing_with_hicache_is_refused(pdmux: bool, hicache: bool, refused: bool) -> None:
    args = SimpleNamespace(enable_pdmux=pdmux, enable_hierarchical_cache=hicache)
    if refused:
        with pytest.raises(ConfigError, match="--enable-pdmux with --enable-hierarchical-cache"):
            ordering.check(args)
    else:
        ordering.check(args)


def test_bind_needs_a_forward_stream_only_where_there_is_a_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ordering._PARTS, "attached", ["load fence (HiCacheController)"])
    ordering.bind(SimpleNamespace(tree_cache=SimpleNamespace()))
    controller = SimpleNamespace()
    runner = SimpleNamespace(forward_stream="forward")
    ordering.bind(
        SimpleNamespace(
            tree_cache=SimpleNamespace(cache_controller=controller),
            tp_worker=SimpleNamespace(model_runner=runner),
        )
    )
    assert loads.bound(controller)
    with pytest.raises(ConfigError, match="no forward stream"):
        ordering.bind(
            SimpleNamespace(
                tree_cache=SimpleNamespace(cache_controller=SimpleNamespace()),
                tp_worker=SimpleNamespace(),
            )
        )
