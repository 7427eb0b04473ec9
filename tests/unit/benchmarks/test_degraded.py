"""The benchmark of degraded prefills counts what its README says."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.reclaim.degraded import cases, known, report
from benchmarks.reclaim.degraded.cases import Aborts
from benchmarks.reclaim.degraded.counts import (
    AILING,
    HEALTHY,
    Outcome,
    Record,
    compare,
    count,
    judge,
    longest_gap_s,
)
from benchmarks.reclaim.degraded.exchange import Abort, Answer, Router
from benchmarks.reclaim.degraded.known import Known, Prompts
from benchmarks.reclaim.degraded.load import Load, Pressure
from benchmarks.reclaim.degraded.stream import Stream
from benchmarks.reclaim.load import End, Ends
from sglang_scaling_fixes.lab.errors import LabError

ABORTED = {"meta_info": {"finish_reason": {"type": "abort", "message": "m"}}}
SHORT = tuple(Known((i,), (i, i + 1)) for i in range(1, 6))
PROMPTS = Prompts(SHORT, (Known((9,) * 50, (9, 10)),))


@pytest.mark.parametrize(
    ("answer", "aborted", "outcome"),
    [
        (Answer(200, {"output_ids": [1, 2]}), False, Outcome.CORRECT),
        (Answer(200, {"output_ids": [1, 3]}), False, Outcome.WRONG),
        (Answer(200, {"output_ids": [1]}), False, Outcome.WRONG),
        (Answer(200, {}), False, Outcome.WRONG),
        (Answer(200, ABORTED), False, Outcome.FAILED),
        (Answer(503, {"error": "come back"}, 1.0), False, Outcome.REFUSED),
        (Answer(500, {"error": "no"}), False, Outcome.FAILED),
        (Answer(0, "no answer within 20 s"), False, Outcome.FAILED),
        (Answer(200, ABORTED), True, Outcome.ABORTED),
        (Answer(503, {"error": "aborted"}), True, Outcome.ABORTED),
        (Answer(0, "no answer within 20 s"), True, Outcome.ABORTED),
        # The abort came too late: an answer is an answer.
        (Answer(200, {"output_ids": [1, 2]}), True, Outcome.CORRECT),
        (Answer(200, {"output_ids": [1, 3]}), True, Outcome.WRONG),
    ],
)
def test_how_a_request_ended(answer: Answer, aborted: bool, outcome: Outcome) -> None:
    assert judge(answer, (1, 2), aborted)[0] is outcome


def test_only_correct_answers_end_a_gap_and_the_edges_count() -> None:
    records = [
        Record(HEALTHY, 2.0, Outcome.CORRECT),
        Record(HEALTHY, 5.0, Outcome.REFUSED),
        Record(HEALTHY, 9.0, Outcome.CORRECT),
    ]
    assert longest_gap_s(records, 10.0) == 7.0
    assert longest_gap_s(records[:1], 10.0) == 8.0
    assert longest_gap_s([], 10.0) == 10.0


def test_each_prefill_has_its_own_counts_and_gap() -> None:
    found = count(
        [
            Record(HEALTHY, 4.0, Outcome.CORRECT),
            Record(HEALTHY, 8.0, Outcome.WRONG),
            Record(AILING, 6.0, Outcome.CORRECT),
            Record(AILING, 7.0, Outcome.REFUSED, "503 room N"),
            Record(AILING, 8.0, Outcome.REFUSED, "503 room N"),
            Record(AILING, 9.0, Outcome.ABORTED),
        ],
        10.0,
    )
    zero = dict.fromkeys(("correct", "wrong", "refused", "failed", "aborted"), 0)
    assert found[HEALTHY] == {**zero, "correct": 1, "wrong": 1, "longest_gap_s": 6.0}
    assert found[AILING] == {
        **zero, "correct": 1, "refused": 2, "aborted": 1, "longest_gap_s": 6.0,
    }  # fmt: skip
    assert found["all"]["correct"] == 2 and found["all"]["longest_gap_s"] == 4.0
    assert found["texts"] == {"ailing refused: 503 room N": 2}


def half(healthy: int, ailing: int, wrong: int = 0) -> dict[str, Any]:
    own = [Record(HEALTHY, 1.0, Outcome.CORRECT)] * healthy
    other = [Record(AILING, 1.0, Outcome.CORRECT)] * ailing
    return count([*own, *other, *[Record(AILING, 1.0, Outcome.WRONG)] * wrong], 10.0)


@pytest.mark.parametrize(
    ("stock", "fixed", "more", "goals"),
    [
        (half(100, 10), half(97, 13), False, [True, True, True]),
        (half(100, 10), half(96, 50), False, [False, True, True]),
        (half(100, 10), half(100, 9), False, [True, False, True]),
        (half(100, 10), half(100, 10), True, [True, False, True]),
        (half(100, 10), half(100, 11), True, [True, True, True]),
        (half(100, 10), half(100, 10, wrong=1), False, [True, True, False]),
        (half(100, 10, wrong=5), half(100, 10), False, [True, True, True]),
        (half(0, 0), half(0, 0), False, [True, True, True]),
    ],
)
def test_what_counts_as_reached(
    stock: dict[str, Any], fixed: dict[str, Any], more: bool, goals: list[bool]
) -> None:
    assert list(compare([stock], [fixed], more)["goals"].values()) == goals


def test_rounds_are_taken_together() -> None:
    found = compare([half(10, 0), half(30, 0)], [half(20, 0), half(19, 1)], False)
    assert (found["healthy_ratio"], found["all_ratio"]) == (0.975, 1.0)
    assert compare([half(0, 0)], [half(1, 0)], False)["all_ratio"] is None


def test_the_same_requests_and_aborts_for_both_halves() -> None:
    aborts = Aborts(0.25, "decode", (1.0, 2.0), long=True)
    once, again = (Stream(PROMPTS, "case", 0, 3, aborts=aborts) for _ in range(2))
    planned = [once.next() for _ in range(400)]
    assert planned == [again.next() for _ in range(400)]
    due = [k for k, one in enumerate(planned) if one.abort_after_s is not None]
    assert len(due) == 100
    assert {b - a for a, b in itertools.pairwise(due)} == {4}
    assert all((one.known in PROMPTS.long) == (k in due) for k, one in enumerate(planned))
    first = [
        next(k for k, one in enumerate(stream) if one.abort_after_s is not None)
        for stream in (
            iter(Stream(PROMPTS, "case", n, 3, aborts=aborts).next, None) for n in range(3)
        )
    ]
    assert len(set(first)) == 3  # the clients do not abort all at once


def test_long_prompts_are_a_share_of_those_not_aborted() -> None:
    stream = Stream(
        PROMPTS, "case", 0, 3, aborts=Aborts(0.2, "prefill", (0.0, 0.1)), long_share=0.5
    )
    planned = [stream.next() for _ in range(400)]
    answered = [one for one in planned if one.abort_after_s is None]
    assert len(answered) == 320
    assert sum(one.known in PROMPTS.long for one in answered) == 160
    assert not any(one.known in PROMPTS.long for one in planned if one not in answered)


def test_prompts_with_more_than_one_answer_are_left_out() -> None:
    prompts = [(1,), (2,), (3,)]
    asked: list[list[known.Ids]] = [[(7,), (8,), (9,)], [(7,), (0,), (9,)]]
    assert known.agreed(prompts, asked, 2) == (Known((1,), (7,)), Known((3,), (9,)))
    with pytest.raises(LabError, match="only 2 of 3"):
        known.agreed(prompts, asked, 3)


def test_a_load_too_short_for_a_case_is_refused() -> None:
    assert cases.chosen([], 40) == list(cases.CASES)
    with pytest.raises(ValueError, match="stopped needs 25"):
        cases.chosen(["stopped"], 20)
    with pytest.raises(ValueError, match="unknown case 'x'"):
        cases.chosen(["x"], 40)


class Fake(BaseHTTPRequestHandler):
    """A prefill and a decode server in one; what it does is what the first prompt token says."""

    seen: list[tuple[str, dict[str, Any]]]
    hold: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body))
        first = body.get("input_ids", [0])[0]
        if self.path == "/generate" and first == 5:
            self.hold.wait(10)
        status = 503 if first == 4 else 200
        answer = json.dumps({"output_ids": [first, first + 1]}).encode()
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""


@contextmanager
def fake() -> Iterator[tuple[Ends, type[Fake]]]:
    handler: type[Fake] = type("Handler", (Fake,), {"seen": [], "hold": threading.Event()})
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            ends = [End(name, "127.0.0.1", server.server_port) for name in ("p", "d")]
            yield Ends(ends[0], ends[1], 1), handler
        finally:
            handler.hold.set()
            server.shutdown()


def ask(ends: Ends, first: int, limit_s: float = 5.0, abort: Abort | None = None) -> Answer:
    async def work() -> Answer:
        async with Router.opened(limit_s) as router:
            return await router.ask(ends, {"rid": "r", "input_ids": [first]}, abort)

    return asyncio.run(work())


def test_a_refusal_says_when_to_come_back_within_reason() -> None:
    with fake() as (ends, _):
        assert ask(ends, 4) == Answer(503, {"output_ids": [4, 5]}, 1.0)
        assert ask(ends, 1) == Answer(200, {"output_ids": [1, 2]})


def test_a_request_without_an_answer_ends_at_the_limit() -> None:
    with fake() as (ends, _):
        assert ask(ends, 5, limit_s=0.3) == Answer(0, "no answer within 0.3 s")


def test_a_prefill_that_cannot_be_reached_fails_the_request_at_once() -> None:
    with fake() as (ends, handler):
        gone = End("p", "127.0.0.1", 1)
        answer = ask(Ends(gone, ends.decode, 1), 5, limit_s=60.0)
        assert answer.status == 0 and "Connect" in answer.body
        assert not handler.hold.is_set()  # decode had not answered


@pytest.mark.parametrize("at", ["prefill", "decode"])
def test_an_abort_goes_to_one_server(at: Any) -> None:
    with fake() as (ends, handler):
        ask(ends, 5, limit_s=1.0, abort=Abort(at, 0.0))
        aborts = [body for path, body in handler.seen if path == "/abort_request"]
    assert aborts == [{"rid": "r"}]


def test_clients_of_both_prefills_count_until_the_time_is_up() -> None:
    case = cases.Case("c", "", aborts=Aborts(0.5, "prefill", (0.0, 0.01)))
    with fake() as (ends, handler):
        load = Load(
            case, {HEALTHY: ends, AILING: ends}, PROMPTS, Pressure(1.5, 2, 0.05, 0.2), 1,
            itertools.count(7),
        )  # fmt: skip
        began = time.monotonic()
        records = asyncio.run(load.run())
        rooms = [b["bootstrap_room"] for path, b in handler.seen if path == "/generate"]
        aborts = [path for path, _ in handler.seen if path == "/abort_request"]
    assert all(0 <= record.ended_s <= time.monotonic() - began for record in records)
    found = count(records, 1.5)
    for prefill in (HEALTHY, AILING):
        assert found[prefill]["correct"] > 0 and found[prefill]["wrong"] == 0
        assert found[prefill]["refused"] > 0
    assert found[HEALTHY]["failed"] > 0 and found[HEALTHY]["aborted"] == 0
    assert aborts
    # Each room twice, once for either server, but for requests hung up before they were sent.
    assert max(rooms.count(room) for room in rooms) == 2


def test_the_report_names_what_was_missed() -> None:
    stock, fixed = (
        {**found, "started_anew": anew}
        for found, anew in ((half(10, 2), ["the ailing prefill"]), (half(5, 2), []))
    )
    case = {"name": "c", "stock": [stock], "fixed": [fixed], **compare([stock], [fixed], False)}
    result = {"cases": [case]}
    assert not report.reached(result)
    text = report.table(result)
    assert "healthy 0.5, all 0.583; MISSED: healthy prefill at least 0.97 of stock, all at" in text
    assert "stock: started anew afterwards: the ailing prefill" in text
