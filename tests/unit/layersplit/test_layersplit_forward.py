"""One pass: who sends, who waits. And the thread on which a CPU's broadcasts run."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from sglang_scaling_fixes.layersplit.forward import Forward
from sglang_scaling_fixes.layersplit.lane import Sent, ThreadLane, lane
from sglang_scaling_fixes.layersplit.plan import Plan

LAYERS = 4


def plan(prefix_pages: int) -> Plan:
    pages = torch.arange(prefix_pages + 1)
    return Plan(pages[1:], pages, pages.int(), 64)


class Log(list[str]):
    def send(self, layer: int) -> Sent:
        self.append(f"send {layer}")
        return _Logged(self, layer)

    def since(self) -> list[str]:
        """What was logged since it was asked last."""
        new = self[:]
        self.clear()
        return new


class _Logged(Sent):
    def __init__(self, log: Log, layer: int) -> None:
        self._log, self._layer = log, layer

    def wait(self) -> None:
        self._log.append(f"wait {self._layer}")


def test_what_is_due_is_sent_before_anybody_waits() -> None:
    log = Log()
    forward = Forward(plan(2), LAYERS, log.send, paged_index=False)
    assert log.since() == ["send 0", "send 1"]
    forward.enter(0)
    assert log.since() == ["wait 0"]
    forward.leave()
    assert log.since() == ["send 2"]
    forward.enter(1)
    forward.enter(1)
    assert log.since() == ["wait 1", "wait 1"]
    forward.enter(2)  # nobody said that layer 1 was left
    assert log.since() == ["send 3", "wait 2"]
    forward.enter(3)
    forward.leave()
    assert log.since() == ["wait 3"]


def test_a_layer_that_was_not_entered_is_not_left() -> None:
    log = Log()
    forward = Forward(plan(2), LAYERS, log.send, paged_index=False)
    forward.leave()
    assert log.since() == ["send 0", "send 1"]


def test_without_a_prefix_nothing_is_sent_and_nobody_waits() -> None:
    log = Log()
    forward = Forward(plan(0), LAYERS, log.send, paged_index=False)
    for layer in range(LAYERS):
        forward.enter(layer)
        forward.leave()
    assert log.since() == []


def test_a_cpu_has_a_thread() -> None:
    assert isinstance(lane("cpu"), ThreadLane)


def test_work_runs_beside_its_launcher_and_in_order() -> None:
    thread, gate, ran = ThreadLane(), threading.Event(), list[int]()

    def blocked() -> None:
        gate.wait()
        ran.append(0)

    sent = [thread.launch(blocked), *(thread.launch(partial(ran.append, i)) for i in (1, 2))]
    assert ran == []  # a reader that does not wait sees what was there before
    gate.set()
    sent[-1].wait()
    assert ran == [0, 1, 2]


def test_time_that_a_reader_waits_is_exposed() -> None:
    thread, gate = ThreadLane(), threading.Event()

    def blocked() -> None:
        gate.wait()

    sent = thread.launch(blocked)
    threading.Timer(0.05, gate.set).start()
    sent.wait()
    exposed = thread.exposed_ms()
    assert exposed > 0
    sent.wait()  # it is there
    assert thread.exposed_ms() == exposed


def test_work_that_fails_fails_where_it_is_waited_for() -> None:
    thread, ran = ThreadLane(), list[int]()

    def fails() -> None:
        raise OSError("the link is gone")

    broken, after = thread.launch(fails), thread.launch(lambda: ran.append(1))
    after.wait()
    assert ran == [1]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast of KV failed") as caught:
            broken.wait()
        assert isinstance(caught.value.__cause__, OSError)
