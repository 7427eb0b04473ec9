"""The lab's streams are as asynchronous as a device's: who does not wait reads the past."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sglang_scaling_fixes.lab.standins import streams  # noqa: E402
from tests import child  # noqa: E402


def held_back() -> tuple[streams.Stream, threading.Event]:
    """A stream that does nothing until the event is set."""
    stream, gate = streams.Stream(), threading.Event()
    stream.submit(gate.wait)
    return stream, gate


def copy_on(stream: streams.Stream, source: Any, target: Any) -> streams.Event:
    event = streams.Event()
    with streams.stream(stream):
        rows = torch.arange(len(source))
        streams.transfer_kv_direct([source], [target], rows, rows, 1)
        event.record()
    return event


def test_a_copy_happens_when_its_stream_comes_to_it() -> None:
    stream, gate = held_back()
    target = torch.zeros(4)
    event = copy_on(stream, torch.ones(4), target)
    assert not event.query()
    assert target.sum() == 0  # read without a wait: stale
    gate.set()
    streams.current_stream().wait_event(event)
    assert target.sum() == 4


def test_the_indices_of_a_copy_are_those_of_its_submission() -> None:
    stream, gate = held_back()
    rows, target = torch.arange(2), torch.zeros(4)
    with streams.stream(stream):
        streams.transfer_kv_direct([torch.ones(4)], [target], rows, rows, 1)
    rows += 2
    gate.set()
    stream.synchronize()
    assert target.tolist() == [1, 1, 0, 0]


def test_a_stream_waits_for_what_the_event_meant_then() -> None:
    first, gate = held_back()
    second = streams.Stream()
    event = first.record_event()
    second.wait_event(event)
    event.record()  # again, on the default stream: reached at once, and not what is waited for
    done = second.record_event()
    assert event.query()
    assert not done.query()
    gate.set()
    done.synchronize()


def test_the_default_stream_is_the_caller() -> None:
    assert streams.Event().query()
    event = streams.Event()
    event.record()
    assert event.query()
    order = []
    streams.current_stream().submit(lambda: order.append("now"))
    order.append("then")
    assert order == ["now", "then"]


def test_wait_stream_and_nesting() -> None:
    first, gate = held_back()
    second = streams.Stream()
    second.wait_stream(first)
    with streams.stream(first):
        assert streams.current_stream() is first
        with streams.stream(second):
            assert streams.current_stream() is second
        with streams.stream(None):
            assert streams.current_stream() is first
    assert not second.record_event().query()
    gate.set()
    second.synchronize()


def test_a_stream_without_work_is_done() -> None:
    stream, gate = held_back()
    assert not stream.query()
    gate.set()
    streams.synchronize()
    assert streams.Stream().query()
    assert streams.current_stream().query()


def test_the_device_waits_for_every_stream() -> None:
    (first, gate), target = held_back(), torch.zeros(4)
    copy_on(first, torch.ones(4), target)
    threading.Timer(0.05, gate.set).start()
    streams.synchronize()
    assert target.sum() == 4


def test_a_failed_copy_ends_the_process() -> None:
    script = (
        "import torch; from sglang_scaling_fixes.lab.standins import streams\n"
        "rows = torch.tensor([9])\n"
        "with streams.Stream():\n"
        "    streams.transfer_kv_direct([torch.ones(4)], [torch.ones(4)], rows, rows, 1)\n"
        "    event = streams.current_stream().record_event()\n"
        "event.synchronize()\n"
    )
    command = [sys.executable, "-c", script]
    done = child.finished(command)
    assert done.returncode == 1
    assert "IndexError" in done.stderr
