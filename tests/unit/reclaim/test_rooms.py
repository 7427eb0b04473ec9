"""Every room that stock takes can be named to prefill; what cannot is refused before it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_scaling_fixes import release
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.kv_poll import FAILED
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.peers import Peers
from sglang_scaling_fixes.reclaim.prefill.interposers import IN_HAND
from sglang_scaling_fixes.reclaim.prefill.side import PrefillSide
from sglang_scaling_fixes.reclaim.stock_wire import is_metadata, is_room, is_success
from tests.decode_rank import OLD, POOL, Decode
from tests.stateful import decode as stateful_decode
from tests.stateful import prefill as stateful_prefill
from tests.stateful.wire import Network, Request

REPLY, RANK = "tcp://127.0.0.1:1", "127.0.0.1:2"
LARGE = (2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1)
UINT64 = st.integers(0, 2**64 - 1)


@given(UINT64)
@example(0)
@example(2**63 - 1)
@example(2**63)
@example(2**64 - 1)
def test_every_room_that_stocks_buffer_takes_survives_every_message(room: int) -> None:
    stored = int(np.array([room], dtype=np.uint64)[0])
    assert stored == room
    abort = messages.Abort(REPLY, RANK, room, "d-1")
    assert messages.unsayable(abort) == ""
    assert messages.strip_trailer([messages.encode(abort)]) == ([], abort)
    frame = b"%d" % room
    destinations = [frame, b"127.0.0.1", b"1", b"s:1", b"", b"", b"", b"1"]
    bind = messages.Bind(REPLY, RANK, "d-1", "d-1")
    stock, received = messages.strip_trailer(messages.attach_trailer(destinations, bind))
    assert is_metadata(stock) and int(stock[0]) == room
    assert isinstance(received, messages.Bind) and received.lease == bind.lease
    tag = messages.encode(messages.SuccessTag("d-1", RANK))
    stock, _ = messages.strip_trailer([frame, b"4", b"0", tag])
    assert is_success(stock) and int(stock[0]) == room


@given(st.one_of(st.integers(2**64), st.integers(max_value=-1)))
@example(2**64)
@example(-1)
def test_what_the_buffer_does_not_take_is_no_room(number: int) -> None:
    assert not is_room(b"%d" % number)
    assert f"room={number}" in messages.unsayable(messages.Abort(REPLY, RANK, number, "d-1"))


@pytest.mark.parametrize("room", [2**64, -1, 2**300, 5.5, True, "seven"], ids=repr)
def test_a_room_that_cannot_be_named_is_refused_before_an_address_is_sent(room: Any) -> None:
    decode = Decode(Config())
    decode.hears(messages.HelloAck(decode.rank, "process", seq=1))
    before = list(decode.socket.sent)
    receiver, slots, aux = decode.expose(room, 50)
    assert decode.socket.sent == before, "nothing was sent"
    (said,) = decode.manager.failures.values()
    assert f"room={room!r}"[:100] in said and "0 to 2**64 - 1" in said
    assert decode.manager.request_status[room] == FAILED
    decode.give_up(receiver, slots, aux)
    decode.guard.tick()
    assert decode.free() == (POOL, 8)
    assert decode.asks() == 0, "there is nobody to ask"
    receiver, slots, aux = decode.expose(7, 50)
    assert decode.socket.sent != before, "another request goes on"


def test_other_things_that_cannot_be_said_are_refused_as_well() -> None:
    decode = Decode(Config())
    before = list(decode.socket.sent)

    def send(room: int, ip: str, states: int) -> str:
        info = {"rank_ip": ip, "rank_port": 1, "is_dummy": False}
        receiver = SimpleNamespace(bootstrap_room=room, bootstrap_infos=[info])
        decode.manager.kv_args.state_types = ["dsa"] * states

        def stock(*_: Any) -> None:
            decode.tap.send_multipart([b"8", b"", b"1", OLD.encode(), b"", b"", b"", b"1"])

        pages = np.array([room], np.int32)
        decode.guard.send_metadata(stock, receiver, pages, room, [[0]] * states)
        return str(decode.manager.failures.get(room, ""))

    assert "rank='xxx" in send(1, "x" * 300, 1)
    assert "states=(1, 1" in send(2, "192.0.2.1", 65)
    assert decode.socket.sent == before
    assert send(3, decode.rank.partition(":")[0], 64) == ""


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(release, "mooncake_retries", lambda: False)
    monkeypatch.setattr(PrefillSide, "current", None)
    monkeypatch.setattr(IN_HAND, "attempt", None)
    yield


def aborted_in_mid_transfer(room: int) -> tuple[bool, int]:
    """Are all slots back after an abort of `room` while its KV is on the wire? And how often did
    prefill take a message for garbage?"""
    prefill: stateful_prefill.Prefill
    network = Network()
    decode = stateful_decode.Decode(network, [lambda: prefill], Config())
    request = Request(0, room, 2)
    prefill = stateful_prefill.Prefill(network, 0, lambda: decode, [request], looks=True)

    def deliver() -> None:
        while network.busy:
            network.busy[0].deliver()

    decode.register(0, anew=True)
    deliver()
    prefill.arrive(request)
    decode.expose(request)
    deliver()
    (served,) = prefill.served
    if prefill.may_send(served):
        prefill.send(served, 2)
        prefill.run()
    decode.give_up(request)
    deliver()
    while prefill.waits is not None:
        network.writes.remove(prefill.waits)
        prefill.run(0)
    prefill.run()
    deliver()
    decode.guard.tick()
    garbage = int(prefill.guard.metrics.report()["garbage"])
    return decode.free == (decode.tokens.size, decode.aux.size), garbage


@pytest.mark.usefixtures("sides")
@pytest.mark.parametrize("room", LARGE)
def test_the_slots_of_a_large_room_come_back(room: int) -> None:
    assert aborted_in_mid_transfer(room) == (True, 0)


class Narrow(msgspec.Struct, frozen=True, tag="abort"):
    """An Abort with the bound of signed numbers."""

    reply_to: str
    rank: str
    room: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    lease: str


@pytest.mark.usefixtures("sides")
def test_with_signed_rooms_they_are_refused_or_else_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: first the narrower wire alone, then without the look before the sending."""
    kinds = messages.Hello | messages.Bind | Narrow | messages.HelloAck | messages.AbortAck
    monkeypatch.setattr(messages, "_decoder", msgspec.msgpack.Decoder(kinds))
    assert aborted_in_mid_transfer(2**63) == (True, 0), "refused before an address was sent"
    monkeypatch.setattr(Peers, "unsayable", lambda *_: "")
    assert aborted_in_mid_transfer(2**63) == (False, 1), "the Abort was garbage"
