"""What would make decode worse off than stock while something is held: each was seen to, once."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

pytest.importorskip("sglang.srt.disaggregation.decode")

from sglang.srt.disaggregation.decode import DecodePreallocQueue

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode import fence, liveness, pressure
from sglang_scaling_fixes.reclaim.rules.exposure import Writer
from tests.decode_rank import NEW, OLD, POOL, PREFILL, Decode
from tests.unit.reclaim.test_decode_pressure import OTHER, armed, gone, poisoned

REGISTERS = [b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"]


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "LOOK_AGAIN_S", 0.0)


def wait_until_served(decode: Decode) -> None:
    """Ticks until `PREFILL` is not refused, for 10 s at most."""
    until = time.monotonic() + 10
    while decode.refused(PREFILL) and time.monotonic() < until:
        decode.guard.tick()
        time.sleep(0.05)


def takes_connections(instance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serves = liveness.serves
    monkeypatch.setattr(liveness, "serves", lambda a: True if a == instance else serves(a))


# A fence that cannot be made


def test_a_second_engine_that_fails_leaves_decode_without_fences() -> None:
    class Engine:
        """Its second one fails as stock's wrapper does: with an error of its own."""

        made = 0

        def __init__(self, hostname: str = "h", gpu_id: int = 0, ib_device: Any = None) -> None:
            Engine.made += 1
            if Engine.made > 1:
                raise RuntimeError("cannot be initialized")
            self.hostname, self.gpu_id, self.ib_device = hostname, gpu_id, ib_device
            self.engine, self.session_id = object(), OLD

    decode = armed(Config())
    decode.manager.engine = Engine()
    fence.record(decode.manager.engine, {"port 1"})
    poisoned(decode, 7, 20)
    decode.guard.tick()
    assert "cannot be initialized" in str(decode.guard.relief.no_fence)


def test_a_close_that_cannot_be_looked_at_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_files(path: str) -> list[str]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "listdir", no_files)
    met: list[set[int]] = []

    def meet(ports: set[int]) -> set[int]:
        met.append(ports)
        return ports

    with pytest.raises(fence.FenceError):
        fence.retire(fence.Retiring("h:1", object(), {"port 1"}, -1), meet)
    assert met == [{1}], "the other ranks wait for it"


# A request that cannot fit beside what stands


@pytest.mark.parametrize(("held", "prompt"), [(0, 9400), (4000, 5900), (4000, 5400), (4000, 5600)])
@pytest.mark.parametrize("answer", [64, 4000])
def test_what_is_taken_fits_by_stocks_own_rule(
    fences: Any, held: int, prompt: int, answer: int
) -> None:
    decode = Decode(Config(), pool=10000)
    decode.hears(messages.HelloAck(decode.rank, "process", seq=1))
    if held:
        decode.give_up(*decode.expose(7, held))  # of a prefill that says nothing
    decode.guard.tick()
    queue = SimpleNamespace(
        num_reserved_decode_tokens=512,
        token_to_kv_pool_allocator=decode.tokens,
        tree_cache=None,
        _rebootstrap_prefill_len=lambda req: prompt,
    )
    params = SimpleNamespace(max_new_tokens=answer)
    needs = DecodePreallocQueue._required_admission_tokens(
        queue, SimpleNamespace(sampling_params=params), prompt, 0, 0
    )
    fits = DecodePreallocQueue._prealloc_reservation_fits(
        queue,
        needs,
        0,
        full_allocatable_tokens=decode.tokens.available_size(),
        swa_allocatable_tokens=None,
    )
    refused = decode.refused(OTHER, tokens=prompt, answer=answer, reserved=512)
    assert refused is (bool(held) and not fits)


@pytest.mark.parametrize("kind", ["mute", "retiring", "replaced"])
def test_nor_is_one_taken_that_does_not_fit_beside_a_hold_nobody_is_blamed_for(
    fences: Any, kind: str
) -> None:
    decode = Decode(Config(fence="off")) if kind == "mute" else armed(Config(fence="auto"))
    if kind == "replaced":
        decode = armed(Config(fence="off"))
    if kind == "retiring":
        decode.expose(8, 10)  # slow, and keeps the old engine
        poisoned(decode, 7, 40)
    else:
        decode.give_up(*decode.expose(7, 40))
    if kind == "replaced":
        decode.tap.send_multipart(REGISTERS)
        decode.hears(messages.HelloAck(decode.rank, "second", seq=2))
    for _ in range(3):
        decode.guard.tick()
    assert decode.guard.ledger.holding and not decode.refused(OTHER, tokens=10)
    assert decode.refused(OTHER, tokens=POOL - 10)


# A prefill that is back, and one that was never ailing


@pytest.mark.parametrize("how", ["off", "no second engine"])
def test_a_restarted_prefill_is_served_without_a_fence(
    fences: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks have new ports; its bootstrap server has the old one."""
    fences.error = "" if how == "off" else "no second registration"
    decode = armed(Config(fence="off" if how == "off" else "auto"))
    decode.give_up(*decode.expose(7, 1))
    gone(decode)
    decode.guard.tick()
    assert decode.refused(PREFILL)  # control: as long as nobody is there
    takes_connections(PREFILL, monkeypatch)
    wait_until_served(decode)
    assert not decode.refused(PREFILL), decode.answers


def test_one_that_answers_at_the_same_rank_port_is_served(fences: Any) -> None:
    decode = armed(Config(fence="off"))
    held = decode.give_up(*decode.expose(7, 1))
    gone(decode)
    with socket.create_server(("127.0.0.1", decode.port)):
        decode.hears(messages.AbortAck(decode.rank, "successor", held.lease, "unknown"))
        wait_until_served(decode)
        assert not decode.refused(PREFILL), decode.answers
        assert decode.guard.ledger.holding  # nothing was proven by it


def test_refusals_do_not_use_up_the_questions(fences: Any) -> None:
    decode = armed(Config(fence="off"))
    flying = decode.expose(8, 10)
    decode.guard.relief.refusing = True  # for another prefill's sake
    for room in range(100, 164):
        assert decode.refused(PREFILL, room=room)
    decode.guard.relief.refusing = False
    decode.give_up(*flying, age=0.0)
    decode.guard.tick()
    assert decode.asks()


def test_a_successor_does_not_wait_for_anothers_transfer(
    fences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = armed(Config())
    receiver, *_ = decode.expose(8, 10)
    exposure = receiver.sglang_scaling_fixes_exposure  # of another prefill, slow and healthy
    exposure.writers = {"192.0.2.9:1": Writer("192.0.2.9:1", sent=True, incarnation="x")}
    exposure.prefill = OTHER
    decode.give_up(*decode.expose(7, 1))
    gone(decode)
    for _ in range(3):
        decode.guard.tick()
    assert fences.switched and not fences.proofs_at_close
    assert decode.refused(PREFILL)  # control: nobody has taken its place
    takes_connections(PREFILL, monkeypatch)
    wait_until_served(decode)
    assert not fences.proofs_at_close and not decode.refused(PREFILL), decode.answers


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_decode_that_stood_still_blames_nobody(
    fences: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = armed(Config(fence=mode))
    exposure = decode.give_up(*decode.expose(7, 60), age=0.0)
    decode.guard.tick()
    decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "writing"))
    decode.guard.tick()
    asked = decode.asks()
    later = time.monotonic() + 5.2  # new weights, a compilation: nobody is asked meanwhile
    monkeypatch.setattr(time, "monotonic", lambda: later)
    decode.guard.tick()
    assert decode.asks() == asked + 1
    assert not decode.refused(PREFILL) and not decode.refused(OTHER) and not fences.switched
    # Control: the same time with its ticks is the prefill's silence.
    for step in range(60):
        monkeypatch.setattr(time, "monotonic", lambda step=step: later + step * 0.1)
        decode.guard.tick()
    assert fences.switched if mode == "always" else decode.refused(PREFILL)


def test_a_time_without_holds_is_no_pause(fences: Any) -> None:
    decode = armed(Config())
    relief = decode.guard.relief
    relief._looked_at -= 3600  # nothing was held for an hour
    decode.give_up(*decode.expose(7, 10), age=0.0)
    decode.guard.tick()
    assert not relief._stood_still
    # Control: one that goes on while something is held is remembered, and forgotten with it.
    relief._looked_at -= 10
    relief._ledger.held[0].gave_up_at -= 20
    decode.guard.tick()
    assert len(relief._stood_still) == 1
    relief._note_pause([], time.monotonic())
    assert not relief._stood_still


def test_a_registration_that_failed_told_nobody(fences: Any) -> None:
    decode = armed(Config(fence="always"))
    decode.give_up(*decode.expose(7, 50))
    decode.socket.full = True
    decode.guard.tick()
    assert fences.switched
    with pytest.raises(zmq.Again):
        decode.tap.send_multipart([*REGISTERS[:3], NEW.encode(), REGISTERS[4]])
    decode.socket.full = False
    before = len(decode.socket.sent)
    decode.expose(8, 10, session=NEW)
    sent = [messages.strip_trailer(frames)[0][0] for frames in decode.socket.sent[before:]]
    assert sent == [b"None", b"8"]
