"""DecodeSide and an ailing prefill: whom it refuses, and how a second engine ends a hold."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode import fence, pressure
from sglang_scaling_fixes.reclaim.retry_after import AILING, REASON_HEADER, REFUSAL, edit
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, ExposureState
from sglang_scaling_fixes.reclaim.rules.quarantine import GRACE_S, Pressure
from sglang_scaling_fixes.reclaim.rules.types import Proof
from tests.decode_rank import NEW, OLD, POOL, PREFILL, Decode
from tests.unit.reclaim.conftest import Fences

OTHER = "192.0.2.9:8998"


@pytest.fixture(autouse=True)
def every_tick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "LOOK_AGAIN_S", 0.0)


def armed(config: Config, **server_args: Any) -> Decode:
    """A decode whose prefill has said that it runs the plugin."""
    decode = Decode(config, **server_args)
    decode.hears(messages.HelloAck(decode.rank, "process", seq=1))
    return decode


def poisoned(decode: Decode, room: int, count: int) -> Exposure:
    """A request given up whose write failed."""
    exposure = decode.give_up(*decode.expose(room, count), age=0.0)
    decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "poisoned", "-1"))
    return exposure


def gone(decode: Decode) -> None:
    """Its process ends, and decode has looked."""
    decode.prefill.close()
    deadline = time.monotonic() + 60  # a look every two seconds
    while not decode.guard.relief._liveness.gone(decode.rank):
        assert time.monotonic() < deadline
        decode.guard.tick()
        time.sleep(0.05)


def land(decode: Decode, receiver: Any) -> None:
    request = SimpleNamespace(kv_receiver=receiver)
    decode.guard.commit(lambda *_: decode.guard.clearing(receiver), None, request)


# -- who is refused ---------------------------------------------------------------------


def test_only_requests_of_the_ailing_prefill_are_refused(fences: Fences) -> None:
    decode = armed(Config(fence="off"))
    decode.give_up(*decode.expose(7, 20))
    assert not decode.refused(PREFILL)
    decode.guard.tick()
    assert not decode.refused(OTHER)
    assert decode.refused(PREFILL)
    (message,) = decode.answers
    assert message.startswith(AILING) and PREFILL in message and "another prefill now" in message
    assert not decode.guard.relief.refusing and not fences.switched


def test_its_half_at_prefill_is_told(fences: Fences) -> None:
    decode = armed(Config(fence="off"))
    decode.give_up(*decode.expose(7, 20))
    decode.guard.tick()
    assert decode.refused(PREFILL, room=99)
    said = [messages.strip_trailer(frames)[1] for frames in decode.socket.sent]
    assert messages.Refusal(decode.rank, 99) in said


def test_a_stock_prefill_is_told_nothing_of_ours(fences: Fences) -> None:
    """Its receive thread would die of the message."""
    decode = Decode(Config(fence="off", max_held=0.1))
    decode.give_up(*decode.expose(7, 20))
    decode.guard.tick()
    sent = len(decode.socket.sent)
    assert decode.refused(PREFILL, room=99) and len(decode.socket.sent) == sent


def test_a_slow_write_is_no_ailment(fences: Fences) -> None:
    """Prefill says that it writes: the hold drains, however long it takes."""
    decode = armed(Config(max_held=0.05))
    exposure = decode.give_up(*decode.expose(7, 90), age=60.0)
    decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "writing"))
    decode.guard.tick()
    assert not decode.refused(PREFILL) and not decode.guard.relief.refusing and not fences.switched
    assert decode.free() == (POOL - 90, 7), "what is written is held"
    writer = exposure.writers[decode.rank]
    writer.writes_at -= GRACE_S + 1  # and nothing more is heard of it
    exposure.waits = None
    decode.guard.tick()
    assert decode.refused(PREFILL) and decode.guard.relief.refusing


def test_one_silent_writer_of_two_is_enough(fences: Fences) -> None:
    decode = armed(Config(fence="off"))
    receiver, slots, aux = decode.expose(7, 20, ranks=2)
    exposure = receiver.sglang_scaling_fixes_exposure
    first, second = exposure.writers.values()
    decode.guard.ledger.sent(exposure, second.rank)
    decode.give_up(receiver, slots, aux)
    first.writes_at = second.writes_at = time.monotonic()
    exposure.waits = None
    decode.guard.tick()
    assert not decode.refused(PREFILL)
    second.writes_at, exposure.waits = 0.0, None
    decode.guard.tick()
    assert decode.refused(PREFILL)


def test_young_holds_blame_nobody(fences: Fences) -> None:
    decode = armed(Config())
    decode.give_up(*decode.expose(7, 90), age=0.0)
    decode.guard.tick()
    assert not decode.refused(PREFILL) and not decode.guard.relief.refusing and not fences.switched


def test_proof_ends_the_refusal(fences: Fences) -> None:
    decode = armed(Config(fence="off"))
    exposure = decode.give_up(*decode.expose(7, 20))
    decode.guard.tick()
    assert decode.refused(PREFILL)
    decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "drained"))
    decode.guard.tick()
    assert not decode.refused(PREFILL) and decode.free() == (POOL, 8)


def test_past_the_bound_everybody_is_refused(fences: Fences) -> None:
    decode = armed(Config(max_held=0.4, fence="off"))
    decode.give_up(*decode.expose(7, 41))
    decode.guard.tick()
    assert decode.guard.relief.refusing and decode.refused(OTHER)
    assert REFUSAL in decode.answers[0]
    assert decode.guard.report()["refusing"] is True


def test_a_prompt_that_does_not_fit_in_what_is_left_is_not_queued(fences: Fences) -> None:
    """It would wait at the head of stock's queue, and everybody behind it."""
    decode = armed(Config(fence="off"))
    decode.give_up(*decode.expose(7, 40))
    assert not decode.refused(OTHER, tokens=POOL)
    decode.guard.tick()
    assert not decode.refused(OTHER, tokens=POOL - 40)
    assert decode.refused(OTHER, tokens=POOL - 39)


def test_a_prefill_without_the_plugin_is_fenced_and_not_refused(fences: Fences) -> None:
    """It can prove nothing; refusing its requests would be worse than stock."""
    decode = Decode(Config())
    decode.give_up(*decode.expose(7, 40))
    decode.guard.tick()
    assert fences.switched and not decode.refused(PREFILL)
    decode.guard.tick()
    decode.guard.tick()
    assert decode.free() == (POOL, 8)


@pytest.mark.parametrize(
    ("text", "reason"), [(REFUSAL, b"decode-full-of-held-kv"), (AILING, b"prefill-ailing")]
)
def test_the_reason_can_be_read_by_a_machine(text: str, reason: bytes) -> None:
    headers, _ = edit([], f'{{"message": "{text} 192.0.2.1:8998"}}'.encode())
    assert dict(headers) == {b"retry-after": b"5", REASON_HEADER: reason}
    assert edit([], b"stock's own")[0] == []


# -- fences -------------------------------------------------------------------------------


def test_one_failed_write_ends_nobody(fences: Fences) -> None:
    """The second engine takes over, and the first goes when what is under way has landed."""
    decode = armed(Config())
    flying, flying_slots, _ = decode.expose(8, 10)
    exposure = poisoned(decode, 7, 50)
    decode.guard.tick()
    assert fences.switched == [OLD] and not fences.proofs_at_close
    assert exposure.state is ExposureState.HELD and decode.free() == (POOL - 60, 6)
    # New requests are served, under the new session, and do not delay the fence.
    decode.guard.tick()
    assert not decode.refused(PREFILL)
    late, *_ = decode.expose(9, 10, session=OLD)
    stock, _ = messages.strip_trailer(decode.socket.sent[-1])
    assert stock[3] == NEW.encode()
    decode.guard.tick()
    assert not fences.proofs_at_close and decode.manager.failures == {}
    land(decode, flying)
    decode.tokens.free(flying_slots)
    decode.guard.tick()
    assert fences.proofs_at_close == ["None"], "the engine goes before the ledger learns of it"
    assert [w.proof for w in exposure.writers.values()] == [Proof.FENCED]
    decode.guard.tick()
    assert decode.guard.report()["frees"] == {"P4": 1}
    assert decode.manager.failures == {} and decode.guard.ledger.find(
        late.sglang_scaling_fixes_exposure.lease
    )
    assert decode.free() == (POOL - 10, 6)


def test_every_prefill_learns_the_new_session(fences: Fences) -> None:
    decode = armed(Config())
    poisoned(decode, 7, 50)
    decode.guard.tick()
    stock, hello = messages.strip_trailer(decode.socket.sent[-1])
    assert stock == [b"None", b"192.0.2.2", b"1", NEW.encode(), b"pointers"]
    assert isinstance(hello, messages.Hello)
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])
    stock, _ = messages.strip_trailer(decode.socket.sent[-1])
    assert stock[3] == NEW.encode()


def test_what_is_sent_again_is_not_proven_by_the_first_engines_end(fences: Fences) -> None:
    decode = armed(Config())
    receiver, slots, aux = decode.expose(8, 10)
    poisoned(decode, 7, 50)
    decode.guard.tick()
    exposure = receiver.sglang_scaling_fixes_exposure
    decode.guard.ledger.sent(exposure, decode.rank)  # stock repeats itself: the new session
    decode.give_up(receiver, slots, aux, age=0.0)
    decode.guard.tick()
    decode.guard.tick()
    assert fences.proofs_at_close and exposure.state is ExposureState.HELD
    assert decode.free() == (POOL - 10, 7)


def test_a_failed_write_blames_its_prefill_until_the_engine_is_another(
    fences: Fences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fence that took long is paid for before the next one."""
    decode = armed(Config())
    decode.guard.relief._next_fence = time.monotonic() + 3600
    poisoned(decode, 7, 20)
    decode.guard.tick()
    assert not fences.switched and decode.refused(PREFILL) and not decode.refused(OTHER)
    decode.guard.relief._next_fence = 0.0
    decode.guard.tick()
    decode.guard.tick()
    assert fences.switched and not decode.refused(PREFILL)


def test_a_fence_is_paid_for_before_the_next(
    fences: Fences, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = armed(Config())
    clock = [time.monotonic()]
    monkeypatch.setattr(pressure, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    switch = fences.switch

    def slow(manager: Any) -> Any:
        clock[0] += 2.0
        return switch(manager)

    monkeypatch.setattr(fence, "switch", slow)
    poisoned(decode, 7, 20)
    decode.guard.tick()
    decode.guard.tick()
    decode.guard.tick()
    assert len(fences.switched) == len(fences.proofs_at_close) == 1
    poisoned(decode, 8, 20)
    clock[0] += 99.0  # 2 s are 2% of 100 s
    decode.guard.tick()
    assert len(fences.switched) == 1
    clock[0] += 1.1
    decode.guard.tick()
    assert len(fences.switched) == 2


def test_a_second_engine_that_cannot_be_had_costs_nothing_else(fences: Fences) -> None:
    fences.error = "no second registration"
    decode = armed(Config())
    exposure = poisoned(decode, 7, 20)
    decode.guard.tick()
    decode.guard.tick()
    assert not fences.switched and exposure.state is ExposureState.HELD
    assert decode.refused(PREFILL) and not decode.refused(OTHER)
    assert decode.guard.relief.no_fence == "no second registration"
    assert decode.manager.session == OLD


def test_an_engine_that_does_not_close_proves_nothing(fences: Fences) -> None:
    fences.unclosable = "still open"
    decode = armed(Config())
    exposure = poisoned(decode, 7, 20)
    for _ in range(4):
        decode.guard.tick()
    assert len(fences.switched) == 1 and exposure.unproven
    assert decode.free() == (POOL - 20, 7)


def test_a_gone_writer_is_fenced_and_its_successor_is_served(fences: Fences) -> None:
    decode = armed(Config())
    decode.give_up(*decode.expose(7, 50))
    decode.guard.tick()
    assert not fences.switched
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])
    decode.hears(messages.HelloAck(decode.rank, "second", seq=2))
    decode.guard.tick()
    assert fences.switched and not decode.refused(PREFILL)
    decode.guard.tick()
    decode.guard.tick()
    assert decode.free() == (POOL, 8)


def test_transfers_of_a_gone_writer_do_not_delay_a_fence(fences: Fences) -> None:
    decode = armed(Config())
    receiver, slots, aux = decode.expose(8, 10)
    decode.give_up(*decode.expose(7, 50))
    gone(decode)
    decode.guard.tick()
    decode.guard.tick()
    assert fences.proofs_at_close
    assert "retry" in decode.manager.failures[8] and decode.manager.request_status[8] == 0
    # Its owner gives up: proven at once, for the write can no longer land.
    assert not decode.give_up(receiver, slots, aux, age=0.0).unproven


def test_a_rank_that_was_gone_once_is_not_gone_for_a_young_hold(fences: Fences) -> None:
    """Another process serves its port by now, and nobody has looked since."""
    decode = armed(Config())
    decode.give_up(*decode.expose(7, 50))
    gone(decode)
    for _ in range(3):
        decode.guard.tick()
    assert len(fences.proofs_at_close) == 1 and decode.free() == (POOL, 8)
    decode.guard.relief._next_fence = 0.0
    with socket.create_server(("127.0.0.1", decode.port)):
        decode.give_up(*decode.expose(8, 50), age=0.0)
        decode.guard.tick()
        assert not decode.refused(PREFILL) and len(fences.switched) == 1


def test_a_success_on_its_way_is_not_taken_back(fences: Fences) -> None:
    decode = armed(Config())
    decode.expose(8, 10)
    decode.manager.request_status[8] = 4
    decode.give_up(*decode.expose(7, 50))
    gone(decode)
    decode.guard.tick()
    decode.guard.tick()
    assert fences.proofs_at_close
    assert decode.manager.request_status[8] == 4 and 8 not in decode.manager.failures


def test_a_silent_writer_is_fenced_only_where_that_is_asked_for(fences: Fences) -> None:
    for mode, switched in (("off", 0), ("auto", 0), ("always", 1)):
        decode = armed(Config(fence=mode))
        decode.give_up(*decode.expose(7, 50))
        decode.guard.tick()
        assert len(fences.switched) == switched, mode


def test_always_does_not_wait_for_the_transfers_of_a_silent_writer(fences: Fences) -> None:
    decode = armed(Config(fence="always"))
    decode.expose(8, 10)
    decode.give_up(*decode.expose(7, 50))
    for _ in range(3):
        decode.guard.tick()
    assert fences.proofs_at_close and "retry" in decode.manager.failures[8]


def test_off_means_off(fences: Fences) -> None:
    decode = armed(Config(fence="off"))
    poisoned(decode, 7, 90)
    for _ in range(3):
        decode.guard.tick()
    assert decode.guard.relief.refusing and not fences.switched


def test_a_hold_that_has_its_proof_calls_for_no_fence(fences: Fences) -> None:
    decode = armed(Config(fence="always"))
    old = decode.give_up(*decode.expose(7, 50))
    decode.hears(messages.AbortAck(decode.rank, "process", old.lease, "drained"))
    decode.give_up(*decode.expose(8, 1), age=0.0)
    decode.guard.tick()
    assert not fences.switched
    assert decode.free() == (POOL - 1, 7)


def test_a_decode_that_cannot_fence_only_refuses(fences: Fences) -> None:
    decode = armed(Config(fence="always"), elastic_ep_backend="mooncake")
    poisoned(decode, 7, 50)
    decode.guard.tick()
    assert decode.refused(PREFILL) and not fences.switched
    assert "elastic" in str(decode.guard.relief.no_fence)


def test_the_engine_is_closed_though_nothing_is_held_any_more(fences: Fences) -> None:
    """The proof came another way meanwhile."""
    decode = armed(Config(fence="always"))
    flying, *_ = decode.expose(8, 10)
    exposure = decode.give_up(*decode.expose(7, 50))
    decode.guard.relief._mode = "auto"  # only the first decision is that of `always`
    decode.guard.relief._pressure = Pressure(refuse=False, fence=True)
    decode.guard.relief._next_look = time.monotonic() + 60
    decode.guard.tick()
    assert fences.switched
    decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "drained"))
    decode.guard.tick()
    assert not decode.guard.ledger.holding and not fences.proofs_at_close
    land(decode, flying)
    decode.guard.tick()
    assert fences.proofs_at_close


# -- a prefill that does not know the session ----------------------------------------------


def test_a_prefill_that_could_not_be_told_gets_no_destinations(fences: Fences) -> None:
    """Old releases look an unregistered session up and die of it."""
    decode = armed(Config(fence="always"))
    decode.give_up(*decode.expose(7, 50))
    decode.socket.full = True
    decode.guard.tick()
    assert len(fences.switched) == 1
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


def test_stocks_own_registration_tells_as_well(fences: Fences) -> None:
    decode = armed(Config(fence="always"))
    decode.give_up(*decode.expose(7, 50))
    decode.socket.full = True
    decode.guard.tick()
    decode.socket.full = False
    decode.tap.send_multipart([b"None", b"192.0.2.2", b"1", NEW.encode(), b"pointers"])
    sent = len(decode.socket.sent)
    decode.expose(8, 10, session=NEW)
    assert len(fences.switched) == 1 and len(decode.socket.sent) == sent + 1
