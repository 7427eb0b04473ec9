"""What verbs in software promise, and that each promise can be seen broken."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.verbs.needs import verbs_in_software

from .drivers import (
    ACCESS,
    ACCESS_EVENT,
    ALL,
    CQ_EVENT,
    ERROR,
    FLUSHED,
    INVALID,
    LENGTH,
    LOCAL,
    NO_EVENT,
    PACKET,
    PATIENCE_MS,
    PROTECTION,
    REMOTE_WRITE,
    RESET,
    RETRIES,
    RTS,
    SIZE,
    SUCCESS,
    Two,
    Verbs,
    arguments,
    eventually,
    two,
)

pytestmark = verbs_in_software
ENOMEM, EINVAL = 12, 22
QUIET_MS = 300


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Verbs:
    return Verbs.compiled(tmp_path_factory.mktemp("verbs") / "shipped")


@pytest.fixture
def both(verbs: Verbs, tmp_path: Path) -> Iterator[Two]:
    with two(verbs, tmp_path) as met:
        yield met


# -- what goes well ------------------------------------------------------------------------


def test_a_write_has_landed_when_it_is_complete(both: Two) -> None:
    for ident in range(20):
        both.receiver.number("fill", 0)
        assert both.sender.posts("write", both.receiver, ident) == 0
        assert both.sender.completions(1) == [(ident, SUCCESS)]
        assert both.receiver.number("count", 7) == SIZE


def test_a_read_brings_what_is_there(both: Two) -> None:
    both.receiver.number("fill", 9)
    assert both.sender.posts("read", both.receiver, 1, offset=PACKET, length=SIZE // 2) == 0
    assert both.sender.completions(1) == [(1, SUCCESS)]
    assert both.sender.number("count", 9) == SIZE // 2


def test_a_message_fills_the_receives_in_their_order(both: Two) -> None:
    for ident in (1, 2):
        assert (
            both.receiver.number("receive", both.receiver.key, ident * PACKET, SIZE // 4, ident)
            == 0
        )
        assert both.sender.posts("send", both.receiver, ident, length=100 * ident) == 0
    assert both.sender.completions(2) == [(1, SUCCESS), (2, SUCCESS)]
    assert both.receiver.completions(2) == [(1, SUCCESS), (2, SUCCESS)]
    assert both.receiver.number("count", 7) == 300


def a_read_brings_its_bytes_before_what_follows_it_is_complete(both: Two) -> None:
    both.receiver.number("fill", 9)
    with both.receiver.held():  # both are there at once
        both.sender.posts("read", both.receiver, 1, length=SIZE // 2)
        both.sender.posts("write", both.receiver, 2, offset=SIZE - 8, length=8)
        assert both.sender.completions(1, QUIET_MS) == []
    assert both.sender.completions(2) == [(1, SUCCESS), (2, SUCCESS)]
    assert both.sender.number("count", 9) == SIZE // 2


def test_a_read_brings_its_bytes_before_what_follows_it_is_complete(both: Two) -> None:
    a_read_brings_its_bytes_before_what_follows_it_is_complete(both)


def test_a_message_waits_for_its_receive(both: Two) -> None:
    both.sender.posts("send", both.receiver, 1, length=64)
    assert both.sender.completions(1, QUIET_MS) == []
    assert both.receiver.number("receive", both.receiver.key, 0, 64, 2) == 0
    assert both.receiver.completions(1) == [(2, SUCCESS)]
    assert both.sender.completions(1) == [(1, SUCCESS)]


def test_a_message_longer_than_its_receive_fails_both(both: Two) -> None:
    both.receiver.number("receive", both.receiver.key, 0, 32, 2)
    both.sender.posts("send", both.receiver, 1, length=64)
    assert both.receiver.completions(1) == [(2, LENGTH)]
    assert both.sender.completions(1) == [(1, INVALID)]


def test_requests_of_a_pair_end_in_their_order(both: Two) -> None:
    for ident in range(64):
        kind = "read" if ident % 7 == 3 else "write"
        length = (ident * 1237) % (3 * PACKET)
        assert both.sender.posts(kind, both.receiver, ident, length=length) == 0
    assert both.sender.completions(64) == [(ident, SUCCESS) for ident in range(64)]


def test_more_than_the_queue_takes_is_refused_until_some_were_seen_to_end(both: Two) -> None:
    with both.receiver.held():
        for ident in range(64):
            assert both.sender.posts("write", both.receiver, ident, length=8) == 0
        assert both.sender.posts("write", both.receiver, 64, length=8) == ENOMEM
    assert len(both.sender.completions(64)) == 64
    assert both.sender.posts("write", both.receiver, 64, length=8) == 0


def test_a_pair_that_has_no_peer_yet_takes_no_request(both: Two) -> None:
    assert both.sender.number("reset") == 0
    assert both.sender.posts("write", both.receiver, 1) == EINVAL


# -- the end of a key ----------------------------------------------------------------------


def nothing_lands_under_a_key_that_ended(both: Two, again: bool) -> None:
    """Whole, on the network already, and addressed to memory that is registered anew."""
    with both.receiver.held():
        for ident in range(3):
            both.sender.posts("write", both.receiver, ident)
        assert both.sender.completions(1, QUIET_MS) == []
        assert both.receiver.number("deregister", both.receiver.key) == 0
        if again:
            assert both.receiver.number("register", ALL) != both.receiver.key
    assert both.sender.completions(3) == [(0, ACCESS), (1, FLUSHED), (2, FLUSHED)]
    assert both.receiver.number("count", 7) == 0
    assert both.receiver.number("event", 5000) == ACCESS_EVENT
    assert both.receiver.number("state") == both.sender.number("state") == ERROR


@pytest.mark.parametrize("again", [False, True], ids=["ended", "and a new one"])
def test_nothing_lands_under_a_key_that_ended(both: Two, again: bool) -> None:
    nothing_lands_under_a_key_that_ended(both, again)


def a_write_beyond_its_key_is_refused_whole(both: Two) -> None:
    to = both.receiver.memory + SIZE // 2
    both.sender.number("write", both.sender.key, to, both.receiver.key, 0, SIZE, 1)
    assert both.sender.completions(1) == [(1, ACCESS)]
    assert both.receiver.number("count", 7) == 0


def test_a_write_beyond_its_key_is_refused_whole(both: Two) -> None:
    a_write_beyond_its_key_is_refused_whole(both)


def test_a_key_that_is_not_open_to_writes_takes_none(both: Two) -> None:
    local = both.receiver.number("register", 1)
    both.sender.posts("write", both.receiver, 1, remote=local)
    assert both.sender.completions(1) == [(1, ACCESS)]
    assert both.receiver.number("count", 7) == 0


def test_a_pair_that_is_not_open_to_writes_takes_none(both: Two) -> None:
    for one in (both.sender, both.receiver):
        assert one.number("reset") == 0
    both.receiver.meets(both.sender, access=LOCAL)
    both.sender.meets(both.receiver)
    both.sender.posts("write", both.receiver, 1)
    assert both.sender.completions(1) == [(1, ACCESS)]
    assert both.receiver.number("count", 7) == 0


def test_memory_that_others_may_write_is_writable_here(both: Two) -> None:
    assert both.receiver.number("register", REMOTE_WRITE) == 0


def test_a_sender_whose_own_key_ended_fails_by_itself(both: Two) -> None:
    with both.receiver.held():
        both.sender.posts("write", both.receiver, 1, length=8)
    assert both.sender.completions(1) == [(1, SUCCESS)]
    both.sender.number("deregister", both.sender.key)
    both.sender.posts("write", both.receiver, 2)
    both.sender.posts("write", both.receiver, 3)
    assert both.sender.completions(2) == [(2, PROTECTION), (3, FLUSHED)]


# -- the end of a pair ---------------------------------------------------------------------


def nothing_lands_through_a_pair_that_ended(both: Two, how: str) -> None:
    with both.receiver.held():
        for ident in range(3):
            both.sender.posts("write", both.receiver, ident)
        assert both.sender.completions(1, QUIET_MS) == []
        assert both.receiver.number(how) == 0
    statuses = [status for _, status in both.sender.completions(3)]
    assert statuses == [RETRIES, FLUSHED, FLUSHED]
    assert both.receiver.number("count", 7) == 0


@pytest.mark.parametrize("how", ["fail", "reset", "destroy"])
def test_nothing_lands_through_a_pair_that_ended(both: Two, how: str) -> None:
    nothing_lands_through_a_pair_that_ended(both, how)


def test_a_failed_pair_flushes_what_it_has_and_what_it_gets(both: Two) -> None:
    with both.receiver.held():
        for ident in range(3):
            both.sender.posts("write", both.receiver, ident)
        assert both.sender.number("fail") == 0
        both.sender.posts("write", both.receiver, 3)
        assert both.sender.completions(4) == [(ident, FLUSHED) for ident in range(4)]


def test_completions_of_a_destroyed_pair_are_never_seen(both: Two) -> None:
    both.sender.posts("write", both.receiver, 1)
    eventually(lambda: both.receiver.number("count", 7) == SIZE)
    time.sleep(QUIET_MS / 1000)  # the answer is back, and nobody looked
    assert both.sender.number("destroy") == 0
    assert both.sender.completions(1, QUIET_MS) == []


def test_completions_of_before_a_reset_are_never_seen(both: Two) -> None:
    both.receiver.number("receive", both.receiver.key, 0, 64, 1)
    both.sender.posts("send", both.receiver, 1, length=64)
    assert both.sender.completions(1) == [(1, SUCCESS)]
    assert both.receiver.number("reset") == 0
    assert both.receiver.completions(1, QUIET_MS) == []
    both.receiver.meets(both.sender)
    assert both.receiver.number("receive", both.receiver.key, 0, 64, 2) == 0


@pytest.mark.parametrize("wrong", [(RESET, 2), (RESET, RTS), (ERROR, 2), (ERROR, RTS), (RTS, 1)])
def test_a_pair_takes_no_short_cut(both: Two, wrong: tuple[int, int]) -> None:
    first, then = wrong
    assert both.sender.number("become", first) == 0
    assert both.sender.number("become", then) == EINVAL
    assert both.sender.number("state") == first


def test_a_completion_queue_that_overflows_is_told_and_takes_its_pair_along(both: Two) -> None:
    sender = both.sender
    sender.pair = sender.number("pair", 64, 16)
    assert both.receiver.number("reset") == 0
    both.receiver.meets(sender)
    sender.meets(both.receiver)
    for ident in range(17):
        assert sender.posts("write", both.receiver, ident, length=8) == 0
    assert sender.number("event", 5000) == CQ_EVENT
    assert sender.number("state") == ERROR
    assert sender.completions(17, QUIET_MS) == [(ident, SUCCESS) for ident in range(16)]
    assert sender.number("event", QUIET_MS) == NO_EVENT


def test_a_pair_answers_only_the_peer_it_was_told_of(both: Two) -> None:
    stranger = both.sender.number("pair", 16)
    assert both.sender.number("meet", both.receiver.pair, both.receiver.address) == 0
    assert stranger != both.sender.pair
    both.sender.posts("write", both.receiver, 1)
    assert both.sender.completions(1) == [(1, RETRIES)]
    assert both.receiver.number("count", 7) == 0


# -- what no end at the sender stops -------------------------------------------------------


def bytes_land_after_the_sender_was_told_that_they_failed(both: Two) -> None:
    with both.receiver.held():
        both.sender.posts("write", both.receiver, 1)
        assert both.sender.completions(1) == [(1, RETRIES)]
        time.sleep(1)  # for the receiver's device to hear of the end, while it holds the bytes
        assert both.receiver.number("count", 7) == 0
    eventually(lambda: both.receiver.number("count", 7) == SIZE)
    assert both.receiver.number("state") == RTS


def test_bytes_land_after_the_sender_was_told_that_they_failed(both: Two) -> None:
    """A network can hold packets for longer than an adapter waits for their answer."""
    bytes_land_after_the_sender_was_told_that_they_failed(both)


@pytest.mark.parametrize("how", ["destroy", "kill"])
def test_bytes_on_the_network_land_after_their_sender_is_gone(both: Two, how: str) -> None:
    with both.receiver.held():
        both.sender.posts("write", both.receiver, 1, length=PACKET)
        assert both.sender.completions(1, QUIET_MS) == []
        if how == "kill":
            both.sender.signal(signal.SIGKILL)
            eventually(lambda: not arguments(both.sender.nic))
        else:
            assert both.sender.number("destroy") == 0
    eventually(lambda: both.receiver.number("count", 7) == PACKET)


# -- a NIC is not its process --------------------------------------------------------------


@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_bytes_go_on_while_a_process_is_stopped(both: Two, whose: str) -> None:
    with both.receiver.held():
        both.sender.posts("write", both.receiver, 1)
        getattr(both, whose).signal(signal.SIGSTOP)
    if whose == "receiver":
        assert both.sender.completions(1) == [(1, SUCCESS)]
        both.receiver.signal(signal.SIGCONT)
    else:
        eventually(lambda: both.receiver.number("count", 7) == SIZE)
        both.sender.signal(signal.SIGCONT)
    assert both.receiver.number("count", 7) == SIZE


def test_no_byte_goes_on_while_the_nic_is_stopped(both: Two) -> None:
    """The control of the test above: it is the NIC that writes."""
    os.kill(both.receiver.nic, signal.SIGSTOP)
    both.sender.posts("write", both.receiver, 1)
    try:
        assert both.sender.completions(1, QUIET_MS) == []
        assert both.receiver.number("count", 7) == 0
    finally:
        os.kill(both.receiver.nic, signal.SIGCONT)
    assert both.sender.completions(1) == [(1, SUCCESS)]


def test_a_peer_that_died_is_noticed(both: Two) -> None:
    both.receiver.signal(signal.SIGKILL)
    eventually(lambda: not arguments(both.receiver.nic))
    both.sender.posts("write", both.receiver, 1)
    assert both.sender.completions(1, 10 * PATIENCE_MS) == [(1, RETRIES)]


def test_a_process_does_not_outlive_its_nic(both: Two) -> None:
    """It would see nothing land, and take that for a proof."""
    os.kill(both.receiver.nic, signal.SIGKILL)
    eventually(lambda: not arguments(both.receiver.pid))


def test_a_healthy_pair_tells_no_event(both: Two) -> None:
    both.sender.posts("write", both.receiver, 1)
    assert both.sender.completions(1) == [(1, SUCCESS)]
    assert both.receiver.number("event", 50) == both.sender.number("event", 50) == NO_EVENT


# -- each promise, broken ------------------------------------------------------------------

Check = Callable[[Two], None]
BROKEN: dict[str, tuple[list[tuple[str, str, str]], Check]] = {
    "a dead key writes": (
        [("memory.c", "if (region) region->key = 0;", "")],
        lambda both: nothing_lands_under_a_key_that_ended(both, again=False),
    ),
    "keys are not told apart": (
        [
            (
                "memory.c",
                "regions[place].key == key",
                "(regions[place].key || key) && place == place",
            )
        ],
        lambda both: nothing_lands_under_a_key_that_ended(both, again=True),
    ),
    "a failed pair takes packets": (
        [
            ("pairs.c", "    pair->state = STATE_ERROR;\n    disconnect(pair, why);\n", ""),
            (
                "pairs.c",
                "    pair->state = order->modify.state;\n",
                "    if (order->modify.state != STATE_ERROR) pair->state = order->modify.state;\n",
            ),
        ],
        lambda both: nothing_lands_through_a_pair_that_ended(both, "fail"),
    ),
    "complete when it is sent": (
        [
            (
                "packets.c",
                "    pair->sent++;\n",
                "    pair->sent++;\n    pair_acked(pair, pair->sent);\n",
            )
        ],
        lambda both: nothing_lands_under_a_key_that_ended(both, again=False),
    ),
    "a read is overtaken": (
        [("packets.c", "(link->readings || (frame", "((frame")],
        a_read_brings_its_bytes_before_what_follows_it_is_complete,
    ),
    "a write is refused at its end": (
        [("packets.c", ".total = index == 0 ? request->length : 0,", ".total = 0,")],
        a_write_beyond_its_key_is_refused_whole,
    ),
    "nothing is flushed": (
        [
            (
                "pairs.c",
                "    for (; pair->sends_done != pair->sends_posted; status = STATUS_FLUSHED)"
                " send_ends(pair, status);\n",
                "    send_ends(pair, status);\n",
            )
        ],
        lambda both: nothing_lands_under_a_key_that_ended(both, again=False),
    ),
    "a peer's end takes back what it sent": (
        [("links.c", "if (link->ended && !held(link))", "if (link->ended)")],
        bytes_land_after_the_sender_was_told_that_they_failed,
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_breaks_a_promise_is_found(how: str, tmp_path: Path) -> None:
    changed, check = BROKEN[how]
    broken = Verbs.compiled(tmp_path / "broken", changed)
    with two(broken, tmp_path) as both, pytest.raises(AssertionError):
        check(both)
