"""Streams that really run beside the forward pass: a thread stands for each.

For HiCache, whose hazards are about order between streams: a copy that is queued on a
stream happens later, when that stream's thread comes to it, and whoever does not wait
reads what was there before. Operations without a stand-in run at once, on the default
stream, whose time is the calling thread's. So is the stream that a whole scheduler runs under
(`StreamContext`, left as it is): the forward pass is never the one who is late.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_NS_PER_CYCLE = 1.0  # of `torch.cuda._sleep`: a clock of 1 GHz


class Event:
    """Reached once the stream it was last recorded on has come that far; at first, reached."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.reached = threading.Event()
        self.reached.set()

    def record(self, stream: Stream | None = None) -> None:
        self.reached = threading.Event()
        (stream or current_stream()).submit(self.reached.set)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.reached.wait()

    def query(self) -> bool:
        return self.reached.is_set()

    def elapsed_time(self, _other: Any) -> float:
        """Milliseconds between two events; not measured."""
        return 0.0


class Stream:
    """Runs what is submitted to it in order, on a thread of its own."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._work: queue.Queue[Callable[[], object]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True, name="lab stream").start()
        _streams.add(self)

    def _run(self) -> None:
        while True:
            try:
                self._work.get()()
            except BaseException:
                # As a device does: nothing after a failed copy can be trusted.
                traceback.print_exc()
                os._exit(1)
            self._work.task_done()

    def submit(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def wait_event(self, event: Event) -> None:
        # What the event stands for now: recording it again later does not matter here.
        self.submit(event.reached.wait)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        """Is all of its work done?"""
        return self._work.unfinished_tasks == 0

    def __enter__(self) -> Stream:
        _stack().append(self)
        return self

    def __exit__(self, *_args: Any) -> None:
        _stack().pop()


class _Default(Stream):
    """The calling thread itself: what is submitted happens before the call returns."""

    def __init__(self) -> None:
        pass

    def submit(self, work: Callable[[], object]) -> None:
        work()

    def query(self) -> bool:
        return True


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()
_DEFAULT = _Default()
_local = threading.local()


def _stack() -> list[Stream]:
    if not hasattr(_local, "streams"):
        _local.streams = []
    streams: list[Stream] = _local.streams
    return streams


def current_stream(*_args: Any) -> Stream:
    """The stream this thread submits to."""
    return _stack()[-1] if _stack() else _DEFAULT


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Submit to `chosen` within the block."""
    with chosen if chosen is not None else contextlib.nullcontext():
        yield


def synchronize(*_args: Any) -> None:
    """The device's: waits for every stream."""
    for stream_ in list(_streams):
        stream_.synchronize()


def sleep(cycles: int) -> None:
    """Stands for `torch.cuda._sleep`: keeps the current stream busy."""
    current_stream().submit(lambda: time.sleep(cycles * _NS_PER_CYCLE / 1e9))


def transfer_kv_direct(
    src_layers: list[Any],
    dst_layers: list[Any],
    src_indices: Any,
    dst_indices: Any,
    page_size: int,
) -> None:
    """Copies rows between device and host pools, layer by layer, on the current stream."""
    del page_size  # rows are listed one by one
    src, dst = src_indices.long().clone(), dst_indices.long().clone()

    def copy() -> None:
        for source, target in zip(src_layers, dst_layers, strict=True):
            target[dst] = source[src]

    current_stream().submit(copy)


def patch_torch(torch: ModuleType) -> None:
    """SGLang's device module on a CPU is torch.cpu, whose own streams do nothing."""
    for device in (torch.cpu, torch.cuda):
        device.Stream = Stream
        device.Event = Event
        device.current_stream = current_stream
        device.stream = stream
        device.synchronize = synchronize
    torch.cuda.ExternalStream = Stream
    torch.cuda.default_stream = lambda *_args: _DEFAULT
    torch.cuda._sleep = sleep


def patch_host_pool(module: ModuleType) -> None:
    """`sglang.srt.mem_cache.pool_host.{mla,dsa}`, which import their kernels beside a GPU only."""
    module.transfer_kv_direct = transfer_kv_direct  # type: ignore[attr-defined]


def patch_host_memory(module: ModuleType) -> None:
    """`sglang.srt.mem_cache.pool_host.common`: host memory needs no registration here."""
    module._cuda_host_register = lambda *_args: None  # type: ignore[attr-defined]
