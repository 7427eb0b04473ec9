"""DecodeSide: what it sends, and how transfers end, over stand-ins for stock's manager."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import layout, messages
from sglang_scaling_fixes.reclaim.retry_after import ENDED
from sglang_scaling_fixes.reclaim.rules.exposure import ExposureState
from sglang_scaling_fixes.reclaim.rules.pace import UNHEARD
from tests.decode_rank import OLD, POOL, Decode


def test_destinations_name_the_process_they_are_meant_for() -> None:
    """To one decode does not know they ride as far behind as a registration."""
    decode = Decode(Config())

    def sent(room: int) -> tuple[int, str | None]:
        decode.expose(room, 1)
        frames = decode.socket.sent[-1]
        bind = messages.strip_trailer(frames)[1]
        assert isinstance(bind, messages.Bind) and bind.stock == 8
        return len(frames), bind.expects

    assert sent(7) == (messages.TRAILER_AT + 1, None)
    decode.hears(messages.HelloAck(decode.rank, "first", seq=1))
    assert sent(8) == (messages.KNOWN_TRAILER_AT + 1, "first")
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])
    assert sent(9) == (messages.TRAILER_AT + 1, None), "it registered anew: who is there now?"
    decode.hears(messages.HelloAck(decode.rank, "second", seq=2))
    assert sent(10) == (messages.KNOWN_TRAILER_AT + 1, "second")


def test_destinations_say_what_they_stand_for() -> None:
    """Prefill compares it with what it wrote, before it reports success (`coverage`)."""
    decode = Decode(Config())
    receiver, _, _ = decode.expose(7, 3)
    _, bind = messages.strip_trailer(decode.socket.sent[-1])
    assert isinstance(bind, messages.Bind)
    assert (bind.pages, bind.states, bind.tokens) == (3, (), None)
    receiver.sglang_scaling_fixes_tokens = lambda: 170
    decode.guard.send_metadata(
        lambda *_: decode.tap.send_multipart([b"8", b"", b"1", OLD.encode(), b"", b"", b"", b"1"]),
        receiver,
        np.array([3, 4], np.int32),
        1,
        [],
    )
    _, bind = messages.strip_trailer(decode.socket.sent[-1])
    assert isinstance(bind, messages.Bind)
    assert (bind.pages, bind.states, bind.tokens) == (2, (), 170)


def test_a_rejected_request_asks_for_nothing() -> None:
    """Stock answers it with the reason, whatever prefill sent: it must not become a failure."""
    decode = Decode(Config())
    receiver, _, _ = decode.expose(7, 3)
    receiver.sglang_scaling_fixes_rejected = lambda: True
    decode.guard.send_metadata(
        lambda *_: decode.tap.send_multipart([b"8", b"", b"1", OLD.encode(), b"", b"", b"", b"1"]),
        receiver,
        np.array([3], np.int32),
        1,
        [],
    )
    _, bind = messages.strip_trailer(decode.socket.sent[-1])
    assert isinstance(bind, messages.Bind)
    assert (bind.pages, bind.states, bind.tokens) == (0, None, None)


@pytest.mark.parametrize(
    ("to_finish", "radix", "nobody_reads"),
    [(None, False, False), ("too long", False, True), ("too long", True, False)],
)
def test_a_placeholder_is_read_by_nobody_but_a_radix_cache(
    to_finish: str | None, radix: bool, nobody_reads: bool
) -> None:
    server_args = SimpleNamespace(disaggregation_decode_enable_radix_cache=radix)
    manager, request = SimpleNamespace(server_args=server_args), SimpleNamespace()
    request.to_finish = to_finish
    assert layout.rejected(manager, request) is nobody_reads


def test_a_success_the_owner_does_not_take_is_given_up() -> None:
    """Another TP rank has failed: this one's success frees nothing before they agree."""
    decode = Decode(Config())
    receiver, slots, aux = decode.expose(7, 50)
    lease = receiver.sglang_scaling_fixes_exposure.lease
    mark = messages.encode(messages.SuccessTag(lease, decode.rank))
    assert decode.guard.inbox.read([b"7", b"4", b"0", mark]) is not None
    decode.manager.request_status[7] = 4
    exposure = decode.give_up(receiver, slots, aux, age=0.0)
    assert exposure.state is ExposureState.PROVEN
    assert decode.free() == (POOL - 50, 7)
    decode.guard.tick()
    assert decode.free() == (POOL, 8)


def test_a_prefill_that_says_nothing_is_asked_rarely_until_it_does() -> None:
    decode = Decode(Config())
    decode.hears(messages.HelloAck(decode.rank, "process", seq=1))
    exposure = decode.give_up(*decode.expose(7, 50), age=0.0)

    def ask_again() -> None:
        exposure.writers[decode.rank].next_abort = 0.0
        decode.guard.peers.send_aborts()

    for _ in range(UNHEARD + 10):
        ask_again()
    assert decode.asks() == UNHEARD
    report = decode.guard.metrics.report()
    assert (report["aborts_sent"], report["aborts_resent"]) == (UNHEARD, UNHEARD - 1)
    mark = messages.encode(messages.SuccessTag("another's", decode.rank))
    decode.guard.inbox.read([b"8", b"4", b"0", mark])
    ask_again()
    assert decode.asks() == UNHEARD + 1, "a success says that it reads what it is sent"


def test_stocks_drained_answer_counts_only_when_it_is_believed() -> None:
    for peer, back in (("hold", False), ("stock-ack", True)):
        decode = Decode(Config(peer=peer))
        receiver, slots, aux = decode.expose(7, 50)
        decode.tap.send_multipart([b"ABORT", b"7", b"192.0.2.2", b"1"])
        decode.give_up(receiver, slots, aux, age=0.0)
        decode.guard.inbox.read([b"ABORT_ACK", b"7"])  # "received"
        decode.guard.tick()
        assert decode.free() == (POOL - 50, 7)
        assert decode.guard.inbox.read([b"ABORT_ACK", b"7", b"0"]) is not None, "stock's own"
        decode.guard.tick()
        assert (decode.free() == (POOL, 8)) is back


class Exploding:
    """Stock's set of ranks that reported, changed by its receive thread while it is looked at."""

    def __iter__(self) -> Iterator[int]:
        yield 0
        raise RuntimeError("Set changed size during iteration")


def test_an_end_that_cannot_be_recorded_frees_nothing_and_ends_the_server() -> None:
    """Stock catches what a receiver's clear raises, and frees the slots all the same."""
    decode = Decode(Config())
    receiver, slots, aux = decode.expose(7, 50)
    before = decode.free()
    decode.manager.prefill_response_tracker = {7: Exploding()}
    with pytest.raises(SystemExit, match="room 7"):
        decode.guard.clearing(receiver)
    decode.tokens.free(slots)
    decode.aux.free(aux)
    assert decode.free() == before


@pytest.mark.parametrize("stale", ["other attempt", "other room", None])
def test_a_metadata_message_that_came_late_is_not_for_stock(stale: str | None) -> None:
    decode = Decode(Config())
    receiver, _, aux = decode.expose(7, 4)
    lease = receiver.sglang_scaling_fixes_exposure.lease
    mark = messages.SuccessTag("an older one" if stale == "other attempt" else lease, decode.rank)
    room = b"8" if stale == "other room" else b"7"
    stock = [b"AUX_DATA", room, b"0", str(aux).encode(), b"\0\0\0\1", b"x"]
    seen = decode.guard.inbox.read([*stock, messages.encode(mark)])
    assert seen == (None if stale else stock)


@pytest.mark.parametrize("told", [True, False])
def test_what_prefill_ended_fails_at_once_and_its_slots_are_back_in_a_tick(told: bool) -> None:
    """Without a word of it, the owner waits, and its slots wait for an answer after that."""
    decode = Decode(Config())
    decode.hears(messages.HelloAck(decode.rank, "process", seq=1))
    receiver, slots, aux = decode.expose(7, 50)
    lease = receiver.sglang_scaling_fixes_exposure.lease
    if told:
        decode.hears(messages.AttemptEnded(decode.rank, "process", lease, "drained", "aborted"))
    failed = decode.manager.request_status[7] == 0
    assert failed is told
    assert decode.manager.failures == ({7: f"{ENDED} (aborted): retry the request"} if told else {})
    decode.give_up(receiver, slots, aux, age=0.0)  # as stock does with a failed room
    assert decode.asks() == (0 if told else 1)
    assert decode.free() == (POOL - 50, 7)
    decode.guard.tick()
    assert (decode.free() == (POOL, 8)) is told
    report = decode.guard.metrics.report()
    assert (report["endings"], report["stale"], report["garbage"]) == (int(told), 0, 0)


def test_an_ending_that_comes_late_fails_nobody() -> None:
    """Its room may be another request's by now."""
    decode = Decode(Config())
    receiver, slots, aux = decode.expose(7, 50)
    lease = receiver.sglang_scaling_fixes_exposure.lease
    decode.give_up(receiver, slots, aux, age=0.0)
    decode.expose(7, 20)
    decode.hears(messages.AttemptEnded(decode.rank, "process", lease, "drained", "aborted"))
    assert decode.manager.failures == {} and decode.manager.request_status[7] == 2
    decode.guard.tick()
    assert decode.free() == (POOL - 20, 7), "it is proof of its own lease"


def test_a_room_of_two_requests_is_failed_for_neither() -> None:
    decode = Decode(Config())
    leases = [decode.expose(7, 10)[0].sglang_scaling_fixes_exposure.lease for _ in range(2)]
    decode.hears(messages.AttemptEnded(decode.rank, "process", leases[0], "drained", "aborted"))
    assert decode.manager.failures == {}


def test_destinations_say_how_long_their_request_has_waited() -> None:
    """So prefill knows whose they are, and that this decode reads an `AttemptEnded`."""
    decode = Decode(Config())

    def waited(room: int, came: float | None) -> float | None:
        receiver, _, _ = decode.expose(room, 1)
        receiver.sglang_scaling_fixes_came = came
        decode.guard.send_metadata(
            lambda *_: decode.tap.send_multipart(
                [b"8", b"", b"1", OLD.encode(), b"", b"", b"", b"1"]
            ),
            receiver,
            np.array([3], np.int32),
            1,
            [],
        )
        _, bind = messages.strip_trailer(decode.socket.sent[-1])
        assert isinstance(bind, messages.Bind)
        return bind.waited

    assert waited(7, None) == 0.0
    assert (waited(9, time.monotonic() - 30.0) or 0.0) >= 30.0
