"""The recorder: what a record and a wait order, and what nothing orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sglang_scaling_fixes.racecheck.recorder import (
    Event,
    Recorder,
    Stream,
    recording,
)
from sglang_scaling_fixes.racecheck.recording_cuda import torch_operations

PAGE = 64


@pytest.fixture
def history() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@pytest.fixture
def buffer(history: Recorder) -> torch.Tensor:
    found = torch.zeros(4 * PAGE, dtype=torch.uint8)
    history.watch("kv[0]", found, page_bytes=PAGE)
    return found


def pages(history: Recorder, buffer: torch.Tensor, *numbers: int) -> set[int]:
    base = buffer.data_ptr()
    return set().union(*(history.pages(base + n * PAGE, PAGE) for n in numbers))


def ordered_by(history: Recorder, buffer: torch.Tensor, how: Callable[..., None]) -> bool:
    """Load on one stream, read on another; `how(load, forward)` is what stands between."""
    load, forward = Stream(name="load"), Stream(name="forward")
    history.kernel("copy", writes=pages(history, buffer, 1), stream=load)
    how(load, forward)
    history.kernel("read", reads=pages(history, buffer, 1), stream=forward)
    return not history.races


def by_event(load: Stream, forward: Stream) -> None:
    event = Event()
    event.record(load)
    forward.wait_event(event)


def by_event_through_a_third_stream(load: Stream, forward: Stream) -> None:
    third = Stream(name="third")
    by_event(load, third)
    by_event(third, forward)


@pytest.mark.parametrize(
    "how",
    [
        by_event,
        by_event_through_a_third_stream,
        lambda load, forward: forward.wait_stream(load),
        lambda load, forward: load.synchronize(),
        lambda load, forward: load.record_event().synchronize(),
    ],
)
def test_ordered(history: Recorder, buffer: torch.Tensor, how: Callable[..., None]) -> None:
    assert ordered_by(history, buffer, how)


@pytest.mark.parametrize(
    "how",
    [
        lambda load, forward: None,
        lambda load, forward: forward.wait_event(Event()),  # never recorded
        lambda load, forward: load.wait_stream(forward),  # the other way round
        lambda load, forward: load.record_event(),  # recorded, not waited for
    ],
)
def test_not_ordered(history: Recorder, buffer: torch.Tensor, how: Callable[..., None]) -> None:
    assert not ordered_by(history, buffer, how)


def test_an_event_covers_what_was_launched_before_it_only(
    history: Recorder, buffer: torch.Tensor
) -> None:
    load, forward = Stream(name="load"), Stream(name="forward")
    event = load.record_event()
    history.kernel("copy", writes=pages(history, buffer, 1), stream=load)
    forward.wait_event(event)
    history.kernel("read", reads=pages(history, buffer, 1), stream=forward)
    assert history.raced_buffers() == 1


def test_pages_are_separate_and_buffers_are_counted_once(
    history: Recorder, buffer: torch.Tensor
) -> None:
    load, forward = Stream(name="load"), Stream(name="forward")
    history.kernel("copy", writes=pages(history, buffer, 1, 2), stream=load)
    history.kernel("read", reads=pages(history, buffer, 0, 3), stream=forward)
    assert history.raced_buffers() == 0
    history.kernel("read", reads=pages(history, buffer, 1, 2), stream=forward)
    assert (history.raced_buffers(), len(history.races)) == (1, 1)


def test_a_race_names_both_sides_and_the_missing_edge(
    history: Recorder, buffer: torch.Tensor
) -> None:
    ordered_by(history, buffer, lambda load, forward: None)
    race = history.races[0].as_dict()
    assert race["buffer"] == "kv[0]"
    assert race["missing_edge"] == "stream 'forward' does not wait for stream 'load'"
    assert (race["earlier"]["access"], race["earlier"]["operation"]) == ("write", "copy")
    assert (race["later"]["access"], race["later"]["stream"]) == ("read", "forward")


def test_a_transfer_thread_orders_only_what_it_does_itself(
    history: Recorder, buffer: torch.Tensor
) -> None:
    forward, other = Stream(name="forward"), Stream(name="other")
    history.kernel("write", writes=pages(history, buffer, 1), stream=forward)
    event = forward.record_event()
    with history.thread("RDMA read"):
        event.synchronize()
        history.kernel("send", reads=pages(history, buffer, 1))
    assert not history.races
    history.kernel("read", reads=pages(history, buffer, 1), stream=other)
    assert history.raced_buffers() == 1


def test_what_is_not_watched_is_not_recorded(history: Recorder) -> None:
    stranger = torch.zeros(PAGE, dtype=torch.uint8)
    history.kernel("read", reads=history.pages(stranger.data_ptr(), PAGE))
    assert history.accesses == 0


@pytest.mark.parametrize(("page", "races"), [(1, 0), (2, 1)])
def test_rows_that_torch_selects_are_all_it_reads(
    history: Recorder, buffer: torch.Tensor, page: int, races: int
) -> None:
    """As an owner packs the pages that a pass reads: loads of other pages are none of its own."""
    load, pack = Stream(name="load"), Stream(name="pack")
    history.kernel("copy", writes=pages(history, buffer, page), stream=load)
    packed = torch.empty(2, PAGE, dtype=torch.uint8)
    with pack, torch_operations():
        torch.index_select(buffer.view(4, PAGE), 0, torch.tensor([2, 3]), out=packed)
    assert len(history.races) == races
