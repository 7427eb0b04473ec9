"""A stream that other workers go on with, cut and failed anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.reclaim import retry_after
from sglang_scaling_fixes.resume import wire
from sglang_scaling_fixes.retry import pair, trail
from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.names import Names
from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.settings import RETRY_STATUS
from sglang_scaling_fixes.retry.trail import FIELD, Continuation, TrailStream

TOKENS = 12
DONE = b"data: [DONE]\n\n"


def test_the_proxy_and_the_plugin_say_the_same_words() -> None:
    """Neither imports the other."""
    assert (wire.FIELD, wire.HEADER.decode()) == (trail.FIELD, trail.RESUMED_HEADER)
    assert trail.PATHS == wire.PATHS
    assert (pair.AILING, pair.ENDED) == (retry_after.AILING, retry_after.ENDED)


def event(token: int, name: str = "w", good: bool = True) -> bytes:
    text = f"t{token} " if good else "GARBAGE "
    return b"data: %s\n\n" % json.dumps({"id": name, "text": text}).encode()


def comment(tokens: range) -> bytes:
    return f": {FIELD}_ids [{','.join(map(str, tokens))}]\n\n".encode()


def written(begin: int, until: int, sizes: list[int], name: str, bad_from: int = TOKENS) -> bytes:
    """Tokens `begin` to `until` by one worker, said in comments of these sizes."""
    out, at = b"", begin
    for size in [*sizes, *[1] * TOKENS]:
        end = min(at + size, until)
        out += b"".join(event(i, name, i < bad_from) for i in range(at, end))
        if end < at + size:  # it broke before it could say them
            break
        out += comment(range(at, end))
        at = end
    return out + (DONE if until == TOKENS else b"")


def fed(stream: TrailStream, data: bytes, cuts: list[int]) -> bytes:
    out = b""
    for cut in [*cuts, len(data)]:
        piece, data = data[:cut], data[cut:]
        if piece and stream.failure is None and not stream.ended:
            out += stream.feed(piece)
    return out


def texts(out: bytes) -> list[str]:
    return [json.loads(part[6:])["text"] for part in out.split(b"\n\n") if b"{" in part]


SIZES = st.lists(st.integers(1, 4), max_size=8)
CUTS = st.lists(st.integers(1, 60), max_size=30)
BREAKS = st.lists(st.tuples(st.integers(0, TOKENS - 1), SIZES, CUTS), max_size=4)


@given(BREAKS, SIZES, CUTS, st.integers(0, 6), st.integers(0, 6))
def test_however_often_it_breaks_the_client_has_every_token_once(
    breaks: list[tuple[int, list[int], list[int]]],
    sizes: list[int],
    cuts: list[int],
    trail: int,
    hold: int,
) -> None:
    so_far, out = Continuation(trail, hold), b""
    for number, (until, its_sizes, its_cuts) in enumerate(breaks):
        begin = len(so_far.fields()[FIELD]["output_ids"])
        assert so_far.ids == list(range(begin))
        steps = so_far.fields()[FIELD]["steps"]
        assert steps == sorted(set(steps)) and [0, *steps][-1] == begin
        stream = TrailStream(Family.OPENAI, so_far, 1 << 20, RETRY_STATUS)
        out += fed(stream, written(begin, max(begin, until), its_sizes, f"w{number}"), its_cuts)
        out += stream.close()
        assert len(texts(out)) == so_far.given <= max(0, len(so_far.ids) - trail)
        assert so_far.go_back(Failure(Reason.LOST, ""))
    begin = len(so_far.fields()[FIELD]["output_ids"])
    stream = TrailStream(Family.OPENAI, so_far, 1 << 20, RETRY_STATUS)
    out += fed(stream, written(begin, TOKENS, sizes, "last"), cuts)
    assert stream.ended and stream.failure is None
    assert texts(out) == [f"t{i} " for i in range(TOKENS)] and out.endswith(DONE)
    assert len({json.loads(p[6:])["id"] for p in out.split(b"\n\n") if b"{" in p}) == 1


@given(st.integers(0, TOKENS - 1), st.integers(0, TOKENS), SIZES, CUTS, st.integers(0, TOKENS))
def test_what_is_suspected_is_dropped_or_the_client_is_told(
    bad_from: int, until: int, sizes: list[int], cuts: list[int], trail: int
) -> None:
    so_far = Continuation(trail, 0)
    so_far.fields()
    stream = TrailStream(Family.OPENAI, so_far, 1 << 20, RETRY_STATUS)
    data = written(0, min(until, TOKENS - 1), sizes, "bad", bad_from)
    words = f"kv_anomaly: x [rule=low_accept_length suspicion=s suspect_from={bad_from}]"
    abort = {"error": {"type": "kv_anomaly", "code": 503, "message": words}}
    out = fed(stream, data + b"data: %s\n\n" % json.dumps(abort).encode(), cuts)
    assert stream.failure is not None and stream.failure.reason is Reason.ANOMALY
    sound = so_far.go_back(stream.failure)
    assert sound == (so_far.given <= bad_from)
    if not sound:
        assert "GARBAGE " in texts(out)
        return
    ids = so_far.fields()[FIELD]["output_ids"]
    assert ids == list(range(len(ids))) and len(ids) <= bad_from
    assert [0, *so_far.fields()[FIELD]["steps"]][-1] == len(ids)
    stream = TrailStream(Family.OPENAI, so_far, 1 << 20, RETRY_STATUS)
    out += fed(stream, written(len(ids), TOKENS, [], "good"), cuts)
    assert texts(out) == [f"t{i} " for i in range(TOKENS)]


def test_a_rule_over_a_whole_attempt_suspects_what_that_attempt_wrote() -> None:
    so_far = Continuation(4, 0, ids=[0, 1], given=2)
    for token in (2, 3, 4, 5):
        if token == 4:
            so_far.fields()
        so_far.ids.append(token)
        so_far.keep(event(token))
    life = Failure(Reason.ANOMALY, "kv_anomaly: x [rule=r suspicion=s suspect_from=0]")
    assert so_far.go_back(life) and so_far.ids == [0, 1, 2, 3]
    assert [tokens for tokens, _ in so_far.kept] == [3, 4]
    assert so_far.size == 8 * 4 + sum(len(each) for _, each in so_far.kept)
    # Without what the guard says, all of the attempt is suspect, too.
    assert so_far.go_back(Failure(Reason.ANOMALY, "kv_anomaly"))


def test_a_trail_has_a_limit() -> None:
    stream = TrailStream(Family.OPENAI, Continuation(1000, 0), 300, RETRY_STATUS)
    for token in range(20):
        if stream.failure is None:
            stream.feed(event(token) + comment(range(token, token + 1)))
    assert stream.failure is not None and stream.failure.reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ({"id": "a", "created": 1}, {"id": "b", "created": 2}, {"id": "a", "created": 1}),
        ({"meta_info": {"id": "a"}}, {"meta_info": {"id": "b"}}, {"meta_info": {"id": "a"}}),
        (
            {"output_index": 0, "item": {"id": "i", "call_id": "c"}, "sequence_number": 4},
            {"output_index": 0, "item_id": "j", "sequence_number": 0},
            {"output_index": 0, "item_id": "i", "sequence_number": 5},
        ),
        (
            {"response": {"id": "a", "created_at": 1, "output": []}},
            {"response": {"id": "b", "created_at": 2, "output": [{"id": "j"}]}},
            {"response": {"id": "a", "created_at": 1, "output": [{"id": "j"}]}},
        ),
        ({"choices": []}, {"choices": [], "id": "b"}, {"choices": [], "id": "b"}),
    ],
)
def test_names_are_those_of_the_first(
    first: dict[str, Any], later: dict[str, Any], expected: dict[str, Any]
) -> None:
    names = Names()
    one, other = (b"data: %s\n\n" % json.dumps(said).encode() for said in (first, later))
    assert names.rewritten(one, continued=False) == one
    out = names.rewritten(other, continued=True)
    assert json.loads(out[6:]) == expected and (later != expected or out == other)
