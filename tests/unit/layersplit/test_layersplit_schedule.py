"""When layers travel, in every order of calls that a forward pass can make."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit.schedule import SCRATCHES, Schedule


@dataclass
class Pass:
    """A forward pass over `schedule`, which asserts what has to hold after every call."""

    schedule: Schedule
    layers: int
    sent: list[int] = field(default_factory=list)
    launched: int = -1
    """The last layer all readers of which have been launched."""

    def begin(self) -> None:
        self._send(self.schedule.begin())

    def enter(self, layer: int) -> None:
        self.launched = max(self.launched, layer - 1)
        self._send(self.schedule.enter(layer))
        # Sent later it would be exposed: it is to travel during all of this layer.
        assert len(self.sent) > min(layer + 1, self.layers - 1)

    def leave(self, layer: int) -> None:
        self.launched = max(self.launched, layer)
        self._send(self.schedule.leave(layer))

    def _send(self, layers: range) -> None:
        for layer in layers:
            assert layer == len(self.sent), "once, and in order"
            assert layer - SCRATCHES <= self.launched, "over a scratch that is still to be read"
            self.sent.append(layer)


Calls = list[tuple[int, bool]]
"""For each layer: how often it is accessed, and whether stock says that it is left."""


def calls(layers: int) -> st.SearchStrategy[Calls]:
    one = st.tuples(st.integers(1, 4), st.booleans())
    return st.lists(one, min_size=layers, max_size=layers)


def run(schedule: Schedule, made: Calls) -> None:
    forward = Pass(schedule, len(made))
    forward.begin()
    for layer, (accesses, left) in enumerate(made):
        for _ in range(accesses):
            forward.enter(layer)
        if left:
            forward.leave(layer)
    assert forward.sent == list(range(len(made)))


@given(st.integers(1, 9).flatmap(lambda n: st.lists(calls(n), min_size=1, max_size=3)))
def test_layers_travel_one_ahead_and_overwrite_nothing(passes: list[Calls]) -> None:
    schedule = Schedule(len(passes[0]))
    for made in passes:
        run(schedule, made)


def test_nothing_is_sent_before_the_first_pass() -> None:
    schedule = Schedule(3)
    assert not schedule.enter(0) and not schedule.leave(2)


def test_a_layer_that_is_left_frees_its_scratch_before_the_next_is_read() -> None:
    schedule = Schedule(4)
    assert list(schedule.begin()) == [0, 1]
    assert list(schedule.enter(0)) == []
    assert list(schedule.leave(0)) == [2]
    assert list(schedule.enter(1)) == []


ONCE: Calls = [(1, True)] * 4
UNSAID: Calls = [(1, False)] * 4


class EntersTooEarly(Schedule):
    def enter(self, layer: int) -> range:
        return super().enter(layer + 1)


class LeavesTooEarly(Schedule):
    def leave(self, layer: int) -> range:
        return super().leave(layer + 1)


class BeginsTooEarly(Schedule):
    def begin(self) -> range:
        super().begin()
        self._sent = 0
        return self._up_to(SCRATCHES)


class Late(Schedule):
    def enter(self, layer: int) -> range:
        return super().enter(layer - 1)


class Again(Schedule):
    def enter(self, layer: int) -> range:
        self._sent = layer
        return super().enter(layer)


@pytest.mark.parametrize(
    ("kind", "made", "why"),
    [
        (EntersTooEarly, UNSAID, "still to be read"),
        (LeavesTooEarly, ONCE, "still to be read"),
        (BeginsTooEarly, ONCE, "still to be read"),
        (Late, UNSAID, "len"),
        (Again, UNSAID, "once, and in order"),
    ],
)
def test_control_another_schedule_is_found(kind: type[Schedule], made: Calls, why: str) -> None:
    run(Schedule(len(made)), made)
    with pytest.raises(AssertionError, match=why):
        run(kind(len(made)), made)
