"""Many transfers given up at once: what that costs the scheduler thread, and what is said of it.

Costs are counted, in calls of Python and C functions: no clock is read.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode import pressure
from sglang_scaling_fixes.reclaim.decode.page_map import PageMap
from sglang_scaling_fixes.reclaim.decode.peers import Peers
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, Writer
from sglang_scaling_fixes.reclaim.rules.pace import UNHEARD
from sglang_scaling_fixes.reclaim.rules.questions import Questions
from sglang_scaling_fixes.reclaim.rules.reasons import why_held
from tests.decode_rank import Decode

FEW, MANY = 40, 200
MINUTE_S = 60.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only a test moves."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def transfers(count: int, tokens: int = 2) -> tuple[Decode, list[tuple[Any, Any, int]]]:
    decode = Decode(Config(max_held=1.0, fence="off"), pool=tokens * count, metadata=count)
    decode.hears(messages.HelloAck(decode.rank, "process", seq=1))
    return decode, [decode.expose(room, tokens) for room in range(count)]


def silent(count: int, tokens: int = 2) -> tuple[Decode, list[Exposure]]:
    """So many transfers given up at once; the prefill rank says nothing more."""
    decode, opened = transfers(count, tokens)
    return decode, [decode.give_up(*transfer, age=0.0) for transfer in opened]


def calls(work: Callable[[], Any]) -> int:
    """How many functions `work` calls, in Python and in C."""
    counted = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counted


# -- what a storm costs ---------------------------------------------------------------------


def storm(count: int) -> int:
    """Calls per transfer of a storm of `count`, with the tick after it."""
    decode, opened = transfers(count)

    def abort() -> None:
        for transfer in opened:
            decode.give_up(*transfer, age=0.0)
        decode.guard.tick()

    return calls(abort) // count


def each_lease(pages_of: PageMap, pages: np.ndarray) -> dict[str, np.ndarray]:
    """As before there was a map: every free against every watched exposure."""
    found = {lease: pages[np.isin(pages, own)] for lease, own in pages_of._leases.values()}
    return {lease: hit for lease, hit in found.items() if len(hit)}


def every_rank(peers: Peers, ranks: Any = None) -> None:
    """As before: whoever gives up looks through all that is held for questions."""
    for exposure in peers._ledger.held:
        _ = exposure.unproven
    all_aborts(peers)


all_aborts = Peers.send_aborts

QUADRATIC: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "every free against every watched exposure": (PageMap, "find", each_lease),
    "questions sought among all that is held": (Peers, "send_aborts", every_rank),
}


def test_a_storm_costs_each_transfer_the_same(now: list[float]) -> None:
    assert storm(MANY) <= storm(FEW) * 1.1


@pytest.mark.parametrize("name", QUADRATIC)
def test_as_it_was_a_larger_storm_costs_each_transfer_more(
    name: str, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls of the test above."""
    monkeypatch.setattr(*QUADRATIC[name])
    assert storm(MANY) > storm(FEW) * 1.5


def turn(count: int) -> int:
    """Calls in one turn while `count` transfers are held."""
    decode, _ = silent(count)
    decode.guard.tick()
    return calls(decode.guard.tick)


def test_a_turn_costs_the_same_whatever_is_held(now: list[float]) -> None:
    assert turn(MANY) <= turn(FEW) + 2


def test_as_it_was_a_turn_costs_more_the_more_is_held(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: everything is assessed in every turn."""
    monkeypatch.setattr(pressure, "LOOK_AGAIN_S", 0.0)
    assert turn(MANY) > turn(FEW) + (MANY - FEW)


# -- questions to a silent rank -------------------------------------------------------------


def asked(decode: Decode) -> list[int]:
    """Rooms of the questions that have left, in their order."""
    said = (messages.strip_trailer(frames)[1] for frames in decode.socket.sent)
    return [message.room for message in said if isinstance(message, messages.Abort)]


def minutes(decode: Decode, now: list[float], count: int) -> None:
    for _ in range(count * 60):
        now[0] += 1.0
        decode.guard.tick()


def test_a_silent_rank_is_asked_first_of_what_it_was_never_asked_of(now: list[float]) -> None:
    decode, held = silent(MANY)
    assert asked(decode) == list(range(UNHEARD)), "each once"
    minutes(decode, now, 10)
    rooms = asked(decode)
    assert rooms == list(range(UNHEARD + 10)), "one a minute, and none of them twice"
    for exposure in held:
        (writer,) = exposure.writers.values()
        assert writer.aborts == rooms.count(exposure.room)
        why = why_held(exposure, decode.guard.ledger.peers)
        assert ("not asked yet (rank silent)" in why) is (exposure.room not in rooms)


def test_once_it_speaks_the_rest_is_asked_at_once(now: list[float]) -> None:
    decode, _ = silent(MANY)
    while len(set(asked(decode))) < MANY:
        before = len(asked(decode))
        decode.guard.peers.pace.heard(decode.rank)
        decode.guard.tick()
        assert len(asked(decode)) == min(before + UNHEARD, MANY)


def test_a_question_that_could_not_leave_was_not_asked(now: list[float]) -> None:
    decode, [transfer] = transfers(1)
    decode.socket.full = True
    exposure = decode.give_up(*transfer, age=0.0)
    assert "not asked yet" in why_held(exposure, decode.guard.ledger.peers)
    assert decode.guard.report()["aborts_sent"] == 0
    decode.socket.full = False
    now[0] += 1.0
    decode.guard.tick()
    assert "asked 1 times" in why_held(exposure, decode.guard.ledger.peers)
    report = decode.guard.report()
    assert (report["aborts_sent"], report["aborts_resent"]) == (1, 0)


def test_nothing_is_left_of_what_has_come_back(now: list[float]) -> None:
    """Also where nobody can be asked: such holds end with stock's own success."""
    for runs_plugin in (True, False):
        decode, held = silent(FEW)
        if not runs_plugin:
            decode.guard.ledger.peers.clear()
        minutes(decode, now, 1)
        decode.guard.ledger.engine_made()
        decode.guard.ledger.engines_closed()
        decode.guard.tick()
        ledger = decode.guard.ledger
        assert not ledger.held and held
        assert not ledger._questions._queues and not ledger._rooms
        assert not len(decode.guard.gate._watched) and not decode.guard.gate._touched  # type: ignore[union-attr]
        assert decode.guard.report()["held_tokens"] == 0


def test_questions_to_one_rank_do_not_wait_for_those_to_another() -> None:
    questions = Questions(1.0, 4.0)
    exposure = Exposure("l", "a", 7, {rank: Writer(rank) for rank in ("p0", "p1")})
    questions.add(exposure, 0.0)
    seen = [
        (second, ask.rank)
        for second in range(12)
        for ask in questions.due(float(second), None, lambda rank, now: rank == "p1" or now >= 5)
    ]
    assert seen == [(0, "p1"), (1, "p1"), (3, "p1"), (5, "p0"), (6, "p0"), (7, "p1"), (8, "p0"),
                    (11, "p1")]  # fmt: skip


# -- what is said -----------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_the_log_has_one_line_for_each_cause_and_its_remedy(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    decode, held = silent(MANY)
    (rank,) = held[0].writers
    for exposure in held[:10]:
        decode.hears(messages.AbortAck(rank, "process", exposure.lease, "poisoned", "it broke"))
    with caplog.at_level(logging.WARNING, "sglang_scaling_fixes.reclaim"):
        minutes(decode, now, 10)
    said = lines(caplog, logging.WARNING)
    assert len(said) == 2 * 10
    silence, broken = said[:2]
    assert f"{MANY - 10} rooms, {2 * (MANY - 10)} token slots, for up to" in silence
    assert f"wait for {rank}: no answer for" in silence and "it ends when it answers" in silence
    assert "10 rooms, 20 token slots" in broken and "it broke" in broken and "by a fence" in broken


def test_many_causes_share_the_lines_there_are(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    decode, held = silent(FEW)
    for number, exposure in enumerate(held):
        (writer,) = exposure.writers.values()
        writer.bound_by, exposure.waits = f"process {number}", None
    now[0] += 6.0
    with caplog.at_level(logging.WARNING, "sglang_scaling_fixes.reclaim"):
        decode.guard.tick()
    *first, last = lines(caplog, logging.WARNING)
    assert len(first) == 16
    assert f"{FEW - 16} rooms, for {FEW - 16} other causes" in last


def test_server_info_shows_every_cause_and_the_oldest_holds(now: list[float]) -> None:
    decode, held = silent(MANY)
    now[0] += 7.0
    report = decode.guard.report()
    assert (report["held_rooms"], report["held_tokens"]) == (MANY, 2 * MANY)
    assert [hold["room"] for hold in report["held"]] == [e.room for e in held[:32]]
    (cause,) = report["held_by_cause"]
    assert cause == {
        "rooms": MANY,
        "tokens": 2 * MANY,
        "oldest_s": 7.0,
        "reason": "no answer yet",
        "waits_for": decode.rank,
    }
    assert len(json.dumps(report)) < 5000


def test_what_stock_still_holds_is_not_called_back(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Since 0.5.20 stock itself may keep the slots of a failed transfer for a while."""
    decode, [(receiver, slots, aux)] = transfers(1, tokens=50)
    exposure = receiver.sglang_scaling_fixes_exposure
    decode.guard.clearing(receiver)
    decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "drained"))
    with caplog.at_level(logging.INFO, "sglang_scaling_fixes.reclaim"):
        decode.guard.tick()
    (line,) = lines(caplog, logging.INFO)
    assert line == (
        "safe-reclaim: room 0: proven after 0.000 s, proof P2; stock still holds 50 token slots"
    )
    decode.tokens.free(slots)
    decode.aux.free(aux)
    assert decode.free() == (50, 1)


def test_the_end_of_a_storm_is_said_in_few_lines(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    decode, held = silent(MANY)
    for exposure in held:
        decode.hears(messages.AbortAck(decode.rank, "process", exposure.lease, "drained"))
    with caplog.at_level(logging.INFO, "sglang_scaling_fixes.reclaim"):
        decode.guard.tick()
    *one_by_one, rest = lines(caplog, logging.INFO)
    assert one_by_one[0] == "safe-reclaim: room 0: 2 token slots back after 0.000 s, proof P2"
    assert len(one_by_one) == 16
    assert f"{MANY - 16} rooms besides: {2 * (MANY - 16)} token slots back" in rest
    report = decode.guard.report()
    assert (report["returned"], report["frees"]) == (MANY, {"P2": MANY})
