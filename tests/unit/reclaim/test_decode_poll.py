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

    def check_status(self, room: int) -> Poll:
        status: Poll = self.request_status[room]
        return status


class Receiver:
    """As stock's: the first final status it sees is what it says from then on."""

    bootstrap_room = 7

    def __init__(self, manager: Manager, exposure: Any) -> None:
        self.sglang_scaling_fixes_exposure = exposure
        self.conclude_state: Poll | None = None
        self.kv_mgr = manager
        self.late = False
        """It has waited for longer than stock allows."""
        self.statuses = manager.request_status
        self.statuses[self.bootstrap_room] = Poll.SUCCESS

    def poll(self) -> Poll:
        if self.conclude_state is not None:
            return self.conclude_state
        status = self.kv_mgr.check_status(self.bootstrap_room)
        if status in (Poll.SUCCESS, Poll.FAILED) or self.late:
            self.conclude_state = Poll.FAILED if status is Poll.WAITING else status
            return self.conclude_state
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


def shown(guard: DecodeSide, receiver: Receiver) -> Poll:
    status: Poll = guard.rooms.succeeded(Receiver.poll, receiver)
    return status


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
    assert shown(guard, second) is Poll.WAITING
    assert second.conclude_state is None and second.kv_mgr is guard._manager
    assert success(guard, second.sglang_scaling_fixes_exposure.lease)
    assert shown(guard, second) is Poll.SUCCESS
    assert second.conclude_state is Poll.SUCCESS


def test_the_state_of_the_room_stays_what_it_is(guard: DecodeSide) -> None:
    """Another receiver of the room may have seen its own success in it, or is about to."""
    second = receiver(guard)
    assert shown(guard, second) is Poll.WAITING
    assert second.statuses[7] is Poll.SUCCESS


def test_a_failure_after_it_is(guard: DecodeSide) -> None:
    second = receiver(guard)
    assert shown(guard, second) is Poll.WAITING
    second.statuses[7] = Poll.FAILED
    assert shown(guard, second) is Poll.FAILED


def test_a_failure_that_comes_while_the_poll_looks_is_shown_by_the_next(guard: DecodeSide) -> None:
    """Stock read a success of the attempt before; the room has failed since."""
    second = receiver(guard)

    def stock(receiver: Receiver) -> Poll:
        status = Receiver.poll(receiver)
        receiver.statuses[7] = Poll.FAILED
        return status

    assert guard.rooms.succeeded(stock, second) is Poll.WAITING
    assert shown(guard, second) is Poll.FAILED


def test_a_receiver_that_waits_on_is_timed_out_by_stock(guard: DecodeSide) -> None:
    second = receiver(guard)
    assert shown(guard, second) is Poll.WAITING
    second.late = True
    assert shown(guard, second) is Poll.FAILED
    assert second.statuses[7] is Poll.SUCCESS, "of another receiver, for all that is known"


def test_a_prefill_without_safe_reclaim_is_taken_at_its_word_for_this_attempt(
    guard: DecodeSide,
) -> None:
    only = receiver(guard)
    assert shown(guard, only) is Poll.WAITING
    assert success(guard, None)
    assert shown(guard, only) is Poll.SUCCESS


def test_a_receiver_whose_destinations_were_never_sent_is_left_alone(guard: DecodeSide) -> None:
    assert shown(guard, Receiver(guard._manager, None)) is Poll.SUCCESS
