"""What decode's scheduler is shown of a success that stock counted by room alone."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages as m
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide

RANK = "127.0.0.1:2"


class Poll(enum.IntEnum):
    FAILED, WAITING, SUCCESS = 0, 2, 4


class Manager(SimpleNamespace):
    """Stock's statuses by room."""

    def __init__(self) -> None:
        super().__init__(
            server_socket=SimpleNamespace(),
            local_ip="127.0.0.1",
            rank_port=1,
            kv_args=SimpleNamespace(state_types=[]),
            request_status={},
        )

    def update_status(self, room: int, status: Poll) -> None:
        self.request_status[room] = status


class Receiver:
    """As stock's: the first final status it sees is what it says from then on."""

    bootstrap_room = 7

    def __init__(self, manager: Manager, exposure: Any) -> None:
        self.sglang_scaling_fixes_exposure = exposure
        self.conclude_state: Poll | None = None
        self.statuses = manager.request_status
        self.statuses[self.bootstrap_room] = Poll.SUCCESS

    def poll(self) -> Poll:
        if self.conclude_state is not None:
            return self.conclude_state
        status: Poll = self.statuses[self.bootstrap_room]
        if status in (Poll.SUCCESS, Poll.FAILED):
            self.conclude_state = status
        return status


@pytest.fixture
def guard() -> Iterator[DecodeSide]:
    saved = DecodeSide.current
    yield DecodeSide(Manager(), Config()).install()
    DecodeSide.current = saved


def receiver(guard: DecodeSide) -> Receiver:
    exposure = guard.ledger.expose(7, [RANK])
    guard.ledger.sent(exposure, RANK)
    return Receiver(guard._manager, exposure)


def success(guard: DecodeSide, lease: str | None) -> bool:
    frames = [b"7", b"4", b"0"]
    frames += [m.encode(m.SuccessTag(lease, RANK))] if lease is not None else []
    return guard.inbox.read(frames) is not None


def test_a_success_counted_for_the_attempt_before_is_not_shown(guard: DecodeSide) -> None:
    first = guard.ledger.expose(7, [RANK])
    assert success(guard, first.lease)
    guard.ledger.give_up(first, now=0.0)
    second = receiver(guard)
    assert Receiver.poll(second) is Poll.SUCCESS, "stock shows it"
    assert guard.succeeded(Receiver.poll, second) is Poll.WAITING
    assert second.conclude_state is None and second.statuses[7] is Poll.WAITING
    assert success(guard, second.sglang_scaling_fixes_exposure.lease)
    second.statuses[7] = Poll.SUCCESS  # stock counts its own
    assert guard.succeeded(Receiver.poll, second) is Poll.SUCCESS
    assert second.conclude_state is Poll.SUCCESS


def test_a_failure_after_it_is(guard: DecodeSide) -> None:
    second = receiver(guard)
    assert guard.succeeded(Receiver.poll, second) is Poll.WAITING
    second.statuses[7] = Poll.FAILED
    assert guard.succeeded(Receiver.poll, second) is Poll.FAILED


def test_a_failure_that_comes_while_the_poll_looks_is_kept(guard: DecodeSide) -> None:
    """Stock read a success of the attempt before; the room has failed since."""
    second = receiver(guard)

    def stock(receiver: Receiver) -> Poll:
        receiver.statuses[7] = Poll.FAILED
        return Poll.SUCCESS

    assert guard.succeeded(stock, second) is Poll.WAITING
    assert second.statuses[7] is Poll.FAILED
    assert guard.succeeded(Receiver.poll, second) is Poll.FAILED


def test_a_prefill_without_safe_reclaim_is_taken_at_its_word_for_this_attempt(
    guard: DecodeSide,
) -> None:
    only = receiver(guard)
    assert guard.succeeded(Receiver.poll, only) is Poll.WAITING
    assert success(guard, None)
    only.statuses[7] = Poll.SUCCESS
    assert guard.succeeded(Receiver.poll, only) is Poll.SUCCESS


def test_a_success_that_comes_while_the_poll_looks_is_not_lost(guard: DecodeSide) -> None:
    """The receive thread may count this attempt's own between the look and the change."""
    only = receiver(guard)

    class Statuses(dict[int, Poll]):
        def __setitem__(self, room: int, status: Poll) -> None:
            if status is Poll.WAITING:  # at the last moment before it is overwritten
                success(guard, only.sglang_scaling_fixes_exposure.lease)
            super().__setitem__(room, status)

    only.statuses = guard._manager.request_status = Statuses(only.statuses)
    assert guard.succeeded(Receiver.poll, only) is Poll.WAITING
    assert guard.succeeded(Receiver.poll, only) is Poll.SUCCESS


def test_a_receiver_whose_destinations_were_never_sent_is_left_alone(guard: DecodeSide) -> None:
    assert guard.succeeded(Receiver.poll, Receiver(guard._manager, None)) is Poll.SUCCESS
