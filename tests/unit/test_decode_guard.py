"""DecodeSide past the bound, over stand-ins for stock's manager and queue."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import layout, messages
from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.decode.peers import OutgoingSocket
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState
from sglang_scaling_fixes.reclaim.rules.pace import UNHEARD
from sglang_scaling_fixes.reclaim.rules.quarantine import GRACE, IDLE_AFTER
from sglang_scaling_fixes.reclaim.rules.types import Proof

torch = pytest.importorskip("torch")
allocators = pytest.importorskip("sglang.srt.mem_cache.allocator")
utils = pytest.importorskip("sglang.srt.disaggregation.utils")

OLD, NEW = "192.0.2.2:1", "192.0.2.2:2"
POOL = 100


class Socket:
    def __init__(self) -> None:
        self.sent: list[list[bytes]] = []
        self.full = False

    def send_multipart(self, frames: list[bytes], *_: Any, **__: Any) -> None:
        if self.full:
            raise zmq.Again
        self.sent.append(frames)


class Manager(SimpleNamespace):
    def __init__(self, **server_args: Any) -> None:
        super().__init__(
            server_args=SimpleNamespace(**server_args),
            server_socket=SimpleNamespace(),
            local_ip="192.0.2.2",
            rank_port=1,
            kv_args=SimpleNamespace(state_types=[]),
            request_status={},
            prefill_response_tracker={},
            session=OLD,
            failures={},
        )

    def get_session_id(self) -> str:
        return str(self.session)

    def record_failure(self, room: int, reason: str) -> None:
        self.failures[room] = reason

    def update_status(self, room: int, status: int) -> None:
        self.request_status[room] = status


class Decode:
    """One decode rank with one prefill rank it has registered at."""

    def __init__(self, config: Config, **server_args: Any) -> None:
        self.prefill = socket.create_server(("127.0.0.1", 0))
        """Alive: its port is open."""
        self.port = self.prefill.getsockname()[1]
        self.rank = f"127.0.0.1:{self.port}"
        self.manager = Manager(**server_args)
        self.guard = DecodeSide(self.manager, config).install()
        self.tokens = allocators.TokenToKVPoolAllocator(POOL, torch.float32, "cpu", None, False)
        self.aux = utils.ReqToMetadataIdxAllocator(8)
        self.guard.install_gate(
            SimpleNamespace(
                token_to_kv_pool_allocator=self.tokens,
                req_to_metadata_buffer_idx_allocator=self.aux,
                gloo_group=None,
                metadata_buffers=None,
                tree_cache=None,
            )
        )
        self.socket = Socket()
        self.tap = OutgoingSocket(
            self.socket,
            self.rank,
            lambda: (self.socket, threading.Lock()),
            self.guard.peers,
        )
        self.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])

    def expose(self, room: int, count: int, session: str = OLD) -> tuple[Any, Any, int]:
        """A request of `count` token slots, its destinations sent as stock sends them."""
        slots, aux = self.tokens.alloc(count), self.aux.alloc()
        info = {"rank_ip": "127.0.0.1", "rank_port": self.port, "is_dummy": False}
        receiver = SimpleNamespace(bootstrap_room=room, bootstrap_infos=[info], conclude_state=None)
        self.manager.request_status[room] = 2

        def stock(receiver: Any, *_: Any) -> None:
            room = str(receiver.bootstrap_room).encode()
            self.tap.send_multipart([room, b"", b"1", session.encode(), b"", b"", b"", b"1"])

        self.guard.send_metadata(stock, receiver, slots.numpy().astype(np.int32), aux, [])
        return receiver, slots, aux

    def give_up(self, receiver: Any, slots: Any, aux: int, age: float = GRACE + 1) -> Exposure:
        """The owner gave up `age` seconds ago, and stock frees everything."""
        exposure: Exposure = receiver.sglang_scaling_fixes_exposure
        self.guard.clearing(receiver)
        exposure.gave_up_at = time.monotonic() - age
        self.tokens.free(slots)
        self.aux.free(aux)
        return exposure

    def hears(self, message: messages.HelloAck | messages.AbortAck) -> None:
        assert self.guard.inbox.read([messages.encode(message)]) is None

    def asks(self) -> int:
        said = (messages.strip_trailer(frames)[1] for frames in self.socket.sent)
        return sum(isinstance(message, messages.Abort) for message in said)

    def free(self) -> tuple[int, int]:
        return self.tokens.available_size(), self.aux.available_size()


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What had been freed by ledger and allocators when the engine was replaced."""
    seen: list[str] = []

    def renew(manager: Any, of_all_ranks: Any) -> tuple[str, str]:
        assert of_all_ranks({1}) == {1}
        held = DecodeSide.current.ledger.held if DecodeSide.current is not None else []
        seen.append(",".join(str(w.proof) for e in held for w in e.writers.values()))
        manager.session = NEW
        return OLD, NEW

    monkeypatch.setattr(fence, "renew", renew)
    return seen


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    saved = DecodeSide.current
    yield
    DecodeSide.current = saved


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


def test_a_successor_nobody_announced_says_who_it_is(fenced: list[str]) -> None:
    """It got destinations meant for its predecessor: nobody can tell who else has them."""
    decode = Decode(Config(max_held=1.0))
    decode.hears(messages.HelloAck(decode.rank, "first", seq=1))
    lost = decode.give_up(*decode.expose(7, 1), age=IDLE_AFTER + 1)
    receiver, slots, aux = decode.expose(8, 1)
    lease = receiver.sglang_scaling_fixes_exposure.lease
    decode.hears(messages.HelloAck(decode.rank, "second", lease))
    assert decode.guard.ledger.peers == {decode.rank: "second"}
    taken = decode.give_up(receiver, slots, aux)
    decode.hears(messages.AbortAck(decode.rank, "second", taken.lease, "drained"))
    decode.hears(messages.AbortAck(decode.rank, "second", lost.lease, "unknown"))
    assert (taken.state, lost.state) == (ExposureState.HELD, ExposureState.HELD)
    decode.guard.tick()
    assert len(fenced) == 1, "the first is gone"


def test_below_the_bound_nothing_is_refused_and_nothing_fenced(fenced: list[str]) -> None:
    decode = Decode(Config(max_held=0.5, fence=True))
    decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    assert not decode.guard.refusing and not fenced
    assert decode.free() == (POOL - 50, 7)


def test_a_gone_writers_hold_below_the_bound_ends_when_nothing_flies(fenced: list[str]) -> None:
    decode = Decode(Config(max_held=1.0))
    decode.prefill.close()
    decode.give_up(*decode.expose(7, 1), age=IDLE_AFTER + 1)
    flying = decode.expose(8, 1)
    deadline = time.monotonic() + 60  # a look every two seconds
    while not decode.guard.relief._liveness.gone(decode.rank) and time.monotonic() < deadline:
        decode.guard.tick()
        time.sleep(0.1)
    decode.guard.tick()
    assert not fenced, "it would end the other transfer"
    request = SimpleNamespace(kv_receiver=flying[0])
    decode.guard.commit(lambda *_: decode.guard.clearing(flying[0]), None, request)
    decode.guard.tick()
    decode.guard.tick()
    assert len(fenced) == 1 and decode.free() == (POOL - 1, 7)
    assert not decode.guard.refusing


def test_a_writer_whose_rank_another_process_serves_is_gone(fenced: list[str]) -> None:
    """Its port is open: its successor's."""
    decode = Decode(Config(max_held=1.0))
    decode.hears(messages.HelloAck(decode.rank, "first", seq=1))
    decode.give_up(*decode.expose(7, 50), age=IDLE_AFTER + 1)
    decode.guard.tick()
    assert not fenced
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])
    decode.hears(messages.HelloAck(decode.rank, "second", seq=2))
    decode.guard.tick()
    assert len(fenced) == 1


def test_a_hold_that_may_still_end_by_itself_calls_for_no_fence(fenced: list[str]) -> None:
    """What is past the bound has its proof, and is back after this tick."""
    decode = Decode(Config(fence=True))
    old = decode.give_up(*decode.expose(7, 50))
    decode.hears(messages.AbortAck(decode.rank, "process", old.lease, "drained"))
    decode.give_up(*decode.expose(8, 1), age=0.0)
    decode.guard.tick()
    assert not fenced
    assert decode.free() == (POOL - 1, 7)


def test_a_decode_that_cannot_fence_only_refuses(fenced: list[str]) -> None:
    decode = Decode(Config(fence=True), elastic_ep_backend="mooncake")
    decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    assert decode.guard.refusing and not fenced
    assert "elastic" in str(decode.guard.relief.no_fence)


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


def test_young_holds_do_not_count(fenced: list[str]) -> None:
    decode = Decode(Config(fence=True))
    decode.give_up(*decode.expose(7, 90), age=0.0)
    decode.guard.tick()
    assert not decode.guard.refusing and not fenced


def test_past_the_bound_without_leave_to_fence_it_only_refuses(fenced: list[str]) -> None:
    decode = Decode(Config())
    decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    looked = decode.guard.relief._liveness._thread
    assert looked is not None
    looked.join()
    decode.guard.tick()
    assert decode.guard.refusing and not fenced
    assert decode.free() == (POOL - 50, 7)


def test_a_writer_that_is_gone_is_fenced_without_being_asked_for(fenced: list[str]) -> None:
    decode = Decode(Config())
    decode.prefill.close()
    decode.give_up(*decode.expose(7, 50))
    deadline = time.monotonic() + 60  # a look every two seconds
    while not fenced and time.monotonic() < deadline:
        time.sleep(0.1)
        decode.guard.tick()
    decode.guard.tick()
    assert len(fenced) == 1 and decode.free() == (POOL, 8)


def test_the_engine_goes_before_the_ledger_learns_of_it(fenced: list[str]) -> None:
    decode = Decode(Config(fence=True))
    exposure = decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    assert fenced == ["None"], "no writer was proven when the engine went"
    assert [w.proof for w in exposure.writers.values()] == [Proof.FENCED]
    assert decode.free() == (POOL - 50, 7), "not in the same tick: the ranks agree first"
    decode.guard.tick()
    assert decode.free() == (POOL, 8)
    assert not decode.guard.refusing
    assert decode.guard.report()["frees"] == {"P4": 1}


def test_a_fence_ends_what_is_in_flight_and_tells_every_prefill_the_new_session(
    fenced: list[str],
) -> None:
    decode = Decode(Config(fence=True))
    flying, flying_slots, flying_aux = decode.expose(8, 10)
    decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    assert decode.manager.request_status[8] == 0
    assert "fenced" in decode.manager.failures[8] and "retry" in decode.manager.failures[8]
    stock, hello = messages.strip_trailer(decode.socket.sent[-1])
    assert stock == [b"None", b"192.0.2.2", b"1", NEW.encode(), b"pointers"]
    assert isinstance(hello, messages.Hello)
    # Its owner gives up: proven at once, for the write can no longer land.
    exposure = decode.give_up(flying, flying_slots, flying_aux, age=0.0)
    assert not exposure.unproven
    # A receiver made before the fence still names the old session; prefill must not see it,
    # neither with destinations nor, if it meets a prefill only now, in the registration.
    decode.expose(9, 10, session=OLD)
    stock, _ = messages.strip_trailer(decode.socket.sent[-1])
    assert stock[3] == NEW.encode()
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])
    stock, _ = messages.strip_trailer(decode.socket.sent[-1])
    assert stock[3] == NEW.encode()


def test_a_prefill_that_could_not_be_told_gets_no_destinations(fenced: list[str]) -> None:
    """Old releases look an unregistered session up and die of it."""
    decode = Decode(Config(fence=True))
    decode.give_up(*decode.expose(7, 50))
    decode.socket.full = True
    decode.guard.tick()
    assert len(fenced) == 1
    sent = len(decode.socket.sent)
    receiver, slots, aux = decode.expose(8, 10, session=NEW)
    assert len(decode.socket.sent) == sent
    assert decode.manager.request_status[8] == 0 and "session" in decode.manager.failures[8]
    exposure = decode.give_up(receiver, slots, aux, age=0.0)
    assert [w.proof for w in exposure.writers.values()] == [Proof.NEVER_SENT]
    decode.socket.full = False
    decode.expose(9, 10, session=NEW)
    told, destinations = (messages.strip_trailer(frames)[0] for frames in decode.socket.sent[-2:])
    assert told[0] == b"None" and told[3] == destinations[3] == NEW.encode()
    sent = len(decode.socket.sent)
    decode.expose(10, 10, session=NEW)
    assert len(decode.socket.sent) == sent + 1, "once told is enough"


def test_stocks_own_registration_tells_as_well(fenced: list[str]) -> None:
    decode = Decode(Config(fence=True))
    decode.give_up(*decode.expose(7, 50))
    decode.socket.full = True
    decode.guard.tick()
    decode.socket.full = False
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", NEW.encode(), b"pointers"])
    sent = len(decode.socket.sent)
    decode.expose(8, 10, session=NEW)
    assert len(fenced) == 1 and len(decode.socket.sent) == sent + 1


def test_a_success_before_the_fence_is_not_taken_back(fenced: list[str]) -> None:
    decode = Decode(Config(fence=True))
    decode.expose(8, 10)
    decode.manager.request_status[8] = 4
    decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    assert len(fenced) == 1
    assert decode.manager.request_status[8] == 4 and 8 not in decode.manager.failures


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
