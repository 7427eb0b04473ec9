"""Events out of chunks, what they say, and what a client is given of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.retry.failure import TYPES, Failure, Reason, error_body, error_event
from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.settings import RETRY_STATUS
from sglang_scaling_fixes.retry.sse import Cutter, TooLong, data_of, events
from sglang_scaling_fixes.retry.stream import Stream
from sglang_scaling_fixes.retry.verdict import judge_body, judge_event, remarkable

# Every way in which line ends can meet, and enough else to tell the parts apart.
STREAMS = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"\r", b"data: x", b": note", b"\n\n", b"a"]), max_size=30
).map(b"".join)
CUTS = st.lists(st.integers(1, 5), max_size=60)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    found = []
    for cut in cuts:
        found.append(data[:cut])
        data = data[cut:]
    return [piece for piece in [*found, data] if piece]


@given(STREAMS, CUTS)
def test_any_chunking_gives_the_same_events_and_bytes(data: bytes, cuts: list[int]) -> None:
    whole = Cutter(1 << 20)
    at_once = events(whole.cut(data)) if data else []
    cutter = Cutter(1 << 20)
    blocks = [cutter.cut(piece) for piece in pieces(data, cuts)]
    assert [event for block in blocks for event in events(block)] == at_once
    assert all(b"".join(events(block)) == block for block in blocks)
    assert sum(map(len, blocks)) + cutter.held == len(data)
    assert data.startswith(b"".join(blocks))


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=8), CUTS)
def test_events_of_a_server_come_out_one_by_one(texts: list[bytes], cuts: list[int]) -> None:
    sent = [b"data: " + text.replace(b"\r", b"") + b"\n\n" for text in texts]
    cutter = Cutter(1 << 20)
    blocks = [cutter.cut(piece) for piece in pieces(b"".join(sent), cuts)]
    assert [event for block in blocks for event in events(block)] == sent and cutter.held == 0
    assert [data_of(event) for event in sent] == [e[6:-2] for e in sent]


def test_an_event_that_never_ends_is_too_long() -> None:
    cutter = Cutter(10)
    assert cutter.cut(b"0123456789") == b""
    with pytest.raises(TooLong):
        cutter.cut(b"0")
    assert Cutter(10).cut(b"0123456789012345\n\n") == b"0123456789012345\n\n"


def test_data_lines_are_joined_and_the_rest_is_not_data() -> None:
    assert data_of(b"event: x\r\ndata: a\r\ndata:b\r\n\r\n") == b"a\nb"
    assert data_of(b": a comment\n\n") == b""


MESSAGE = "kv_anomaly: accept length 1.02"
ABORT = {"type": "abort", "status_code": 503, "err_type": "kv_anomaly", "message": MESSAGE}

ANOMALIES: list[tuple[Family, dict[str, Any]]] = [
    (Family.GENERATE, {"text": "x", "meta_info": {"finish_reason": ABORT}}),
    (Family.GENERATE, {"meta_info": {"finish_reason": {"type": "abort", "message": MESSAGE}}}),
    (
        Family.GENERATE,
        {"meta_info": {"finish_reason": {"type": "abort", "err_type": "kv_anomaly"}}},
    ),
    (Family.OPENAI, {"error": {"type": "kv_anomaly", "message": "", "code": 503}}),
    (Family.OPENAI, {"error": {"type": "InternalServerError", "message": MESSAGE, "code": 503}}),
    (Family.OPENAI, {"error": {"type": "x", "message": MESSAGE, "code": "503"}}),
    (Family.OPENAI, {"error": MESSAGE}),
    (Family.OPENAI, {"object": "error", "type": "kv_anomaly", "message": MESSAGE, "code": 503}),
    (
        Family.RESPONSES,
        {"type": "response.failed", "response": {"error": {"code": "x", "message": MESSAGE}}},
    ),
    (Family.RESPONSES, {"type": "error", "code": "kv_anomaly", "message": MESSAGE}),
    (Family.MESSAGES, {"type": "error", "error": {"type": "overloaded_error", "message": MESSAGE}}),
]


def event(said: Any) -> bytes:
    return b"data: " + json.dumps(said).encode() + b"\n\n"


@pytest.mark.parametrize(("family", "said"), ANOMALIES)
def test_every_form_of_an_anomaly_is_known(family: Family, said: dict[str, Any]) -> None:
    for spelled in (event(said), event(said).replace(b": ", b":").replace(b", ", b",")):
        verdict = judge_event(spelled, family, RETRY_STATUS)
        assert verdict.failure is not None and verdict.failure.reason is Reason.ANOMALY
        assert remarkable(spelled)


def test_an_anomaly_is_known_beside_what_only_python_calls_json() -> None:
    said = {"text": "\ud800", "logprob": float("nan"), "meta_info": {"finish_reason": ABORT}}
    assert judge_event(event(said), Family.GENERATE, RETRY_STATUS).failure is not None
    assert judge_body(200, json.dumps(said).encode(), None, RETRY_STATUS) is not None
    assert (
        judge_event(b"data: " + b"[" * 100_000 + b"\n\n", Family.GENERATE, RETRY_STATUS).failure
        is None
    )


@pytest.mark.parametrize("code", sorted(RETRY_STATUS))
def test_an_error_that_says_not_here_fails_the_attempt(code: int) -> None:
    for said in (
        {"error": {"type": "x", "message": "queue is full", "code": code}},
        {"meta_info": {"finish_reason": {"type": "abort", "status_code": code, "message": ""}}},
    ):
        verdict = judge_event(event(said), Family.GENERATE, RETRY_STATUS)
        assert verdict.failure is not None and verdict.failure.reason is Reason.UNAVAILABLE


@pytest.mark.parametrize(
    "said",
    [
        {"error": {"type": "BadRequestError", "message": "no", "code": 400}},
        {"error": {"type": "InternalServerError", "message": "no", "code": 501}},
        {"error": None, "choices": []},
        {"meta_info": {"finish_reason": {"type": "abort", "status_code": 400, "message": "no"}}},
        {"meta_info": {"finish_reason": {"type": "stop", "matched": "kv_anomaly"}}},
        {"choices": [{"index": 0, "delta": {"content": 'kv_anomaly: "error" "abort" [DONE]'}}]},
        {"type": "response.failed", "response": {"error": {"message": "asked for"}}},
        [1],
        7,
    ],
)
def test_everything_else_is_the_clients(said: Any) -> None:
    for family in Family:
        assert judge_event(event(said), family, RETRY_STATUS).failure is None


@pytest.mark.parametrize(
    "said",
    [
        {"meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}},
        {"meta_info": {"finish_reason": {"type": "abort", "status_code": 500, "message": ""}}},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "abort"}]},
        {"choices": [{"finish_reason": None}, {"index": 1, "text": "", "finish_reason": "abort"}]},
    ],
)
def test_an_abort_that_does_not_blame_the_request_is_nobodys_answer(said: Any) -> None:
    for retryable in (RETRY_STATUS, frozenset[int]()):
        verdict = judge_event(event(said), Family.OPENAI, retryable)
        assert verdict.failure is not None
        assert verdict.failure.reason in (Reason.ABORTED, Reason.UNAVAILABLE)
    assert remarkable(event(said))


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({"error": {"type": "BadRequestError", "message": "no", "code": 400}}, 400),
        ({"error": {"type": "x", "message": "no"}}, 500),
        ({"meta_info": {"finish_reason": {"type": "abort", "status_code": 400}}}, 400),
        ({"type": "response.failed", "response": {"error": {"message": "asked for"}}}, 500),
        ({"meta_info": {"finish_reason": {"type": "stop"}}}, None),
    ],
)
def test_an_error_that_is_passed_on_is_noticed(said: Any, status: int | None) -> None:
    stream = Stream(Family.GENERATE, 0, 1000, 1, RETRY_STATUS)
    assert stream.feed(event(said)) and stream.told == status


def test_comments_are_no_progress() -> None:
    stream = Stream(Family.OPENAI, 0, 1000, 1, RETRY_STATUS)
    for chunk, expected in ((b": a\n\n", 0), (token(0), 1), (b": b\n\n", 1), (token(1), 2)):
        stream.feed(chunk)
        assert stream.progress == expected
    assert Stream(Family.OPENAI, 9, 1000, 1, RETRY_STATUS).progress == 0
    held = Stream(Family.OPENAI, 9, 1000, 1, RETRY_STATUS)
    assert held.feed(b": a\n\n" + token(0)) == b"" and held.progress == 1


@given(st.text(max_size=50))
def test_text_alone_is_never_more_than_content(text: str) -> None:
    """What a model writes, and it may write anything, ends or fails no stream."""
    for said in (
        {"choices": [{"index": 0, "delta": {"content": text + '{"error": {"code": 503}}'}}]},
        {"text": text + "data: [DONE]", "meta_info": {"finish_reason": None}},
    ):
        verdict = judge_event(event(said), Family.OPENAI, RETRY_STATUS)
        assert verdict.failure is None and not verdict.end


BODIES: list[tuple[int, Any, Reason | None]] = [
    (503, {"error": {"type": "kv_anomaly", "code": 503, "message": MESSAGE}}, Reason.ANOMALY),
    (
        503,
        {"object": "error", "type": "kv_anomaly", "message": MESSAGE, "code": 503},
        Reason.ANOMALY,
    ),
    (503, {"object": "error", "type": "503", "message": MESSAGE, "code": 503}, Reason.ANOMALY),
    (503, {"detail": MESSAGE}, Reason.ANOMALY),
    (500, {"detail": MESSAGE}, Reason.ANOMALY),
    (200, {"text": "x", "meta_info": {"finish_reason": ABORT}}, Reason.ANOMALY),
    (
        200,
        [{"meta_info": {"finish_reason": None}}, {"meta_info": {"finish_reason": ABORT}}],
        Reason.ANOMALY,
    ),
    (503, {"error": {"message": "queue"}}, Reason.UNAVAILABLE),
    (502, "not an object", Reason.UNAVAILABLE),
    (504, None, Reason.UNAVAILABLE),
    (500, {"error": {"message": "bug"}}, Reason.UNAVAILABLE),
    (501, {"error": {"message": "not here"}}, None),
    (400, {"error": {"message": MESSAGE, "type": "kv_anomaly"}}, None),
    (429, {"error": {"message": "slow down"}}, None),
    (200, {"text": "abort", "meta_info": {"finish_reason": {"type": "stop"}}}, None),
    (200, {"meta_info": {"finish_reason": {"type": "abort", "status_code": 400}}}, None),
    (200, {"meta_info": {"finish_reason": {"type": "abort", "message": "x"}}}, Reason.ABORTED),
    (200, {"choices": [{"finish_reason": "abort"}]}, Reason.ABORTED),
]


@pytest.mark.parametrize(("status", "said", "reason"), BODIES)
def test_bodies(status: int, said: Any, reason: Reason | None) -> None:
    found = judge_body(status, json.dumps(said).encode(), 7, RETRY_STATUS)
    assert (found.reason if found else None) is reason
    if found and status >= 400:
        assert found.retry_after == 7


def test_a_body_that_is_not_json_is_judged_by_its_status() -> None:
    assert judge_body(200, b'"abort', None, RETRY_STATUS) is None
    found = judge_body(503, b"<html>", None, RETRY_STATUS)
    assert found is not None and "<html>" in found.message


# The stream as the client gets it


def token(i: int, index: int = 0) -> bytes:
    return event({"choices": [{"index": index, "delta": {"content": f"t{i}"}}]})


def generated(i: int, index: int | None = None, finish: Any = None) -> bytes:
    said: dict[str, Any] = {
        "text": "x" * i,
        "meta_info": {"completion_tokens": i, "finish_reason": finish},
    }
    return event(said if index is None else {**said, "index": index})


DONE = b"data: [DONE]\n\n"


def given_out(stream: Stream, chunks: list[bytes]) -> list[int]:
    """The chunks after which something came out."""
    return [number for number, chunk in enumerate(chunks) if stream.feed(chunk)]


def test_nothing_held_back_flows_at_once_but_for_comments() -> None:
    stream = Stream(Family.OPENAI, 0, 1000, 1, RETRY_STATUS)
    assert given_out(stream, [b": hello\n\n", token(0), token(1)]) == [1, 2]


def test_tokens_are_counted_as_the_events_say() -> None:
    stream = Stream(Family.GENERATE, 10, 1000, 1, RETRY_STATUS)
    assert given_out(stream, [generated(4), generated(9), generated(11)]) == [2]


def test_usage_counts_where_it_is_there() -> None:
    def with_usage(count: int) -> bytes:
        choice = {"index": 0, "delta": {"content": "x"}}
        return event({"choices": [choice], "usage": {"completion_tokens": count}})

    stream = Stream(Family.OPENAI, 10, 10_000, 1, RETRY_STATUS)
    assert given_out(stream, [with_usage(4), with_usage(8), with_usage(10)]) == [2]


def test_without_a_count_an_event_with_content_is_one_token() -> None:
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    stream = Stream(Family.OPENAI, 2, 10_000, 1, RETRY_STATUS)
    assert given_out(stream, [role, token(0), role, token(1)]) == [3]


def test_all_generations_count_and_finished_ones_are_enough() -> None:
    stream = Stream(Family.GENERATE, 5, 10_000, generations=2, retryable=RETRY_STATUS)
    stop = {"type": "stop"}
    chunks = [generated(9, 0), generated(2, 1), generated(3, 1, stop)]
    assert given_out(stream, chunks) == [2]


def test_a_generation_nobody_announced_counts_once_it_has_begun() -> None:
    stream = Stream(Family.GENERATE, 5, 10_000, 1, RETRY_STATUS)
    assert stream.feed(generated(2, 0) + generated(9, 1)) == b""
    assert stream.feed(generated(5, 0))


@pytest.mark.parametrize("hold", [0, 3, 100])
@given(cuts=CUTS)
def test_a_good_stream_comes_out_whole(hold: int, cuts: list[int]) -> None:
    sent = b"".join([token(i) for i in range(6)]) + DONE
    stream = Stream(Family.OPENAI, hold, 10_000, 1, RETRY_STATUS)
    out = [stream.feed(piece) for piece in pieces(sent, [cut * 7 for cut in cuts])]
    assert b"".join(out) == sent and stream.ended and stream.failure is None and stream.held == 0


@given(cuts=CUTS, hold=st.integers(0, 8), failing=st.integers(0, 6))
def test_nothing_of_a_failing_event_comes_out(cuts: list[int], hold: int, failing: int) -> None:
    good = [token(i) for i in range(failing)]
    bad = event({"text": "GARBAGE", "meta_info": {"finish_reason": ABORT}})
    stream, out = Stream(Family.OPENAI, hold, 10_000, 1, RETRY_STATUS), b""
    for piece in pieces(b"".join(good) + bad + DONE, [cut * 7 for cut in cuts]):
        out += stream.feed(piece)
        if stream.failure is not None:
            break
    assert stream.failure is not None and stream.failure.reason is Reason.ANOMALY
    if failing < max(hold, 1) or not cuts:
        assert out == b""  # still held, or held until the block that brought the bad news
    else:
        assert out in (b"", b"".join(good))


@pytest.mark.parametrize("family", Family)
def test_a_stream_without_its_end_is_lost(family: Family) -> None:
    stream = Stream(family, 0, 1000, 1, RETRY_STATUS)
    stream.feed(token(0) + b"data: half")
    assert stream.close() == b"" and not stream.ended
    assert stream.failure is not None and stream.failure.reason is Reason.LOST


@pytest.mark.parametrize(
    ("family", "end"),
    [
        (Family.GENERATE, DONE),
        (Family.OPENAI, DONE),
        (Family.RESPONSES, event({"type": "response.completed"})),
        (Family.RESPONSES, event({"type": "response.incomplete"})),
        (Family.RESPONSES, event({"type": "response.failed", "response": {}})),
        (Family.MESSAGES, event({"type": "message_stop"})),
    ],
)
def test_each_api_has_its_own_end(family: Family, end: bytes) -> None:
    for hold in (0, 50):
        stream = Stream(family, hold, 1000, 1, RETRY_STATUS)
        assert stream.feed(end) == end and stream.ended


def test_too_much_to_hold_is_a_failure_of_this_request() -> None:
    stream = Stream(Family.OPENAI, 100, 300, 1, RETRY_STATUS)
    out = [stream.feed(token(i)) for i in range(5)]
    assert not any(out) and stream.failure is not None
    assert stream.failure.reason is Reason.TOO_LARGE and not stream.failure.elsewhere
    stream = Stream(Family.OPENAI, 0, 300, 1, RETRY_STATUS)
    assert stream.feed(b"data: " + b"x" * 400) == b"" and stream.failure is not None


# What a client is told


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("family", Family)
def test_every_error_has_a_type_and_is_an_event_of_its_api(reason: Reason, family: Family) -> None:
    failure = Failure(reason, "why")
    told = error_event(family, failure, 9)
    assert remarkable(told) and b"".join(events(told)) == told
    said = json.loads(data_of(events(told)[0]))
    inner = said.get("error", said)
    assert TYPES[reason] in (inner["type"], inner.get("code"))
    assert inner["message"] == "why" and inner["retryable"] is (reason is not Reason.TOO_LARGE)
    body = json.loads(error_body(family, failure.type, "why", 503, retryable=True))
    assert body["error"]["type"] == TYPES[reason]


def test_numbered_events_go_on_being_numbered() -> None:
    stream = Stream(Family.RESPONSES, 0, 1000, 1, RETRY_STATUS)
    stream.feed(event({"type": "response.output_text.delta", "sequence_number": 41}))
    stream.feed(b"data: ha")
    told = error_event(Family.RESPONSES, Failure(Reason.LOST, "x"), stream.next_sequence)
    assert json.loads(data_of(told))["sequence_number"] == 42
