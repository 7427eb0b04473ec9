"""DecodeSide past the bound: refusals and fences."""

from __future__ import annotations

import time
from types import SimpleNamespace

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.rules.exposure import ExposureState
from sglang_scaling_fixes.reclaim.rules.quarantine import IDLE_AFTER_S
from sglang_scaling_fixes.reclaim.rules.types import Proof
from tests.decode_rank import NEW, OLD, POOL, Decode


def test_a_successor_nobody_announced_says_who_it_is(fenced: list[str]) -> None:
    """It got destinations meant for its predecessor: nobody can tell who else has them."""
    decode = Decode(Config(max_held=1.0))
    decode.hears(messages.HelloAck(decode.rank, "first", seq=1))
    lost = decode.give_up(*decode.expose(7, 1), age=IDLE_AFTER_S + 1)
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
    decode.give_up(*decode.expose(7, 1), age=IDLE_AFTER_S + 1)
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
    decode.give_up(*decode.expose(7, 50), age=IDLE_AFTER_S + 1)
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
