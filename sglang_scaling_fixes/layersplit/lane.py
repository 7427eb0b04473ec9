"""Where broadcasts run: beside the forward pass, each after what it was told to follow.

A lane is a CUDA stream; without a GPU it is a thread. What is launched on it runs later, so that a
reader that does not wait for its `Sent` really reads what was there before.
"""

from __future__ import annotations

import abc
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], None]


class Sent(abc.ABC):
    """One launched piece of work."""

    @abc.abstractmethod
    def wait(self) -> None:
        """What this thread launches from now on happens after that work."""


class Lane(abc.ABC):
    """Runs work in the order in which it is launched."""

    @abc.abstractmethod
    def launch(self, work: Work, *used: torch.Tensor) -> Sent:
        """Run `work` after all that this thread has launched so far. It reads the tensors `used`,
        which may be dropped at once: their memory is kept until then."""

    @abc.abstractmethod
    def exposed_ms(self) -> float:
        """Milliseconds for which readers have waited so far. Never waits itself."""


class StreamLane(Lane):
    """A CUDA stream of its own. Nothing here makes the host wait."""

    def __init__(self, device: Any) -> None:
        self._stream = torch.cuda.Stream(device)
        self._waits: deque[tuple[Any, Any]] = deque()
        self._exposed_ms = 0.0

    def launch(self, work: Work, *used: torch.Tensor) -> Sent:
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in used:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            work()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return _Event(event, self._waits)

    def exposed_ms(self) -> float:
        while self._waits and all(event.query() for event in self._waits[0]):
            arrived, sent = self._waits.popleft()
            self._exposed_ms += max(0.0, arrived.elapsed_time(sent))
        return self._exposed_ms


class _Event(Sent):
    def __init__(self, event: Any, waits: deque[tuple[Any, Any]]) -> None:
        self._event = event
        self._waits: deque[tuple[Any, Any]] | None = waits

    def wait(self) -> None:
        stream = torch.cuda.current_stream()
        if self._waits is not None:  # the first reader is the one that may be held up
            arrived = torch.cuda.Event(enable_timing=True)
            arrived.record(stream)
            self._waits.append((arrived, self._event))
            self._waits = None
        stream.wait_event(self._event)


class ThreadLane(Lane):
    """A thread: a CPU computes when it is called, so all that was launched has happened by then."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._exposed_s = 0.0
        threading.Thread(target=self._serve, daemon=True, name="layer-split broadcasts").start()

    def _serve(self) -> None:
        while True:
            self._queue.get()()

    def launch(self, work: Work, *used: torch.Tensor) -> Sent:
        del used  # `work` holds them
        done = _Done(self)
        self._queue.put(lambda: done.run(work))
        return done

    def waited(self, seconds: float) -> None:
        self._exposed_s += seconds

    def exposed_ms(self) -> float:
        return self._exposed_s * 1e3


class _Done(Sent):
    def __init__(self, lane: ThreadLane) -> None:
        self._lane = lane
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self, work: Work) -> None:
        try:
            work()
        except BaseException as error:  # raised again where it is waited for
            self._error = error
        self._done.set()

    def wait(self) -> None:
        if not self._done.is_set():
            began = time.perf_counter()
            self._done.wait()
            self._lane.waited(time.perf_counter() - began)
        if self._error is not None:
            raise RuntimeError("a broadcast of KV failed") from self._error


def lane(device: Any) -> Lane:
    """The lane for tensors on `device`."""
    device = torch.device(device)
    return StreamLane(device) if device.type == "cuda" else ThreadLane()
