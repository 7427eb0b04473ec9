"""What the proxy knows of a request's body, what it adds to it, and what limits requests."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest

from sglang_scaling_fixes.retry.budget import Budget
from sglang_scaling_fixes.retry.rendezvous import LAST_ROOM, rendezvous
from sglang_scaling_fixes.retry.request import (
    ROUTING_FIELDS,
    BodyFacts,
    TooMany,
    body_facts,
    with_fields,
    without_routing,
)
from sglang_scaling_fixes.retry.retries import (
    LEAST,
    LONGEST_WAIT_S,
    LostRequests,
    RetryBudget,
    wait_seconds,
)
from sglang_scaling_fixes.retry.servers import Role, Server


def test_a_budget_is_never_exceeded_and_comes_back() -> None:
    budget = Budget(10)
    one, other = budget.lease(), budget.lease()
    assert one.resize(6) and not other.resize(5) and other.resize(4) and not one.resize(7)
    assert one.resize(6) and budget.held == 10
    one.resize(0)
    other.resize(0)
    assert budget.held == 0


def test_retries_of_refused_requests_are_a_share_of_all() -> None:
    budget = RetryBudget()
    assert [budget.take(1) for _ in range(LEAST + 1)] == [*[True] * LEAST, False]
    assert budget.take(1000) and not budget.take(10)
    budget.give_back()
    budget.give_back()
    assert budget.take(10)


def test_waits_double_and_are_spread() -> None:
    chance = random.Random(1)
    waits = [[wait_seconds(n, chance) for _ in range(50)] for n in (1, 2, 3, 60)]
    assert all(len(set(spread)) > 10 for spread in waits)
    assert (
        max(waits[0]) <= 0.025 <= min(waits[1]) * 1.001 and max(waits[1]) <= min(waits[2]) * 1.001
    )
    assert max(waits[3]) <= LONGEST_WAIT_S


def test_a_request_that_lost_two_workers_is_remembered_for_a_while() -> None:
    lost = LostRequests(60.0)
    assert lost.refused_for("/generate", b"x", 0.0) == 0
    lost.add("/generate", b"x", 0.0)
    lost.add("/generate", b"y", 30.0)
    lost.add("/generate", b"x", 40.0)
    assert lost.refused_for("/generate", b"x", 60.0) == 40.0
    assert lost.refused_for("/v1/completions", b"x", 60.0) == 0
    assert lost.refused_for("/generate", b"y", 90.0) == 0
    assert lost.refused_for("/generate", b"x", 100.0) == 0


def facts(path: str, said: dict[str, Any]) -> BodyFacts:
    found = body_facts(path, json.dumps(said).encode())
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("path", "said", "batch", "count"),
    [
        ("/generate", {"text": "x"}, None, 1),
        ("/generate", {"text": ["x"]}, 1, 1),
        ("/generate", {"text": ["x", "y"], "sampling_params": {"n": 3}}, 2, 6),
        ("/generate", {"text": ["x", "y"], "sampling_params": [{"n": 3}, {}]}, 2, 6),
        ("/generate", {"input_ids": [1, 2]}, None, 1),
        ("/generate", {"input_ids": [[1], [2]]}, 2, 2),
        ("/generate", {"input_embeds": [[0.1], [0.2]]}, None, 1),
        ("/generate", {"input_embeds": [[[0.1]], [[0.2]]]}, 2, 2),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2}, 2, 4),
        ("/v1/completions", {"prompt": [1, 2]}, None, 1),
        ("/v1/chat/completions", {"messages": [], "n": 2}, None, 2),
        ("/v1/chat/completions", {"n": "many"}, None, 1),
        ("/v1/chat/completions", {"n": True}, None, 1),
        ("/generate", {"text": None, "input_ids": [[1], [2]]}, 2, 2),
        ("/v1/completions", {"prompt": "a, b"}, None, 1),
        ("/v1/responses", {"input": ["x", "y"]}, None, 1),
        ("/generate", {}, None, 1),
        ("/generate", {"text": []}, None, 1),
        ("/vertex_generate", {"instances": []}, None, 1),
    ],
)
def test_how_many_prompts_and_generations(
    path: str, said: dict[str, Any], batch: int | None, count: int
) -> None:
    assert (facts(path, said).batch_size, facts(path, said).generations) == (batch, count)


def test_instances_are_prompts() -> None:
    said = {"instances": [{"text": "x"}] * 3, "parameters": {"sampling_params": {"n": 2}}}
    assert facts("/vertex_generate", said).generations == 6
    assert facts("/vertex_generate", {"parameters": 7}).generations == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"7", b'{"text": ', b'{"a": NaN}', b"\xef\xbb\xbf{}", b"[" * 100_000],
)
def test_what_is_no_json_object_has_no_facts(body: bytes) -> None:
    assert body_facts("/generate", body) is None


def test_parts_of_a_body_that_nobody_asked_for_are_not_made() -> None:
    """Control: read whole, the same body takes 30 times its own memory."""
    body = b'{"stream": true, "rid": "r", "x": [' + b"{}," * 400_000 + b"{}]}"
    tracemalloc.start()
    try:
        found = body_facts("/generate", body)
        _, ours = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        json.loads(body)
        _, whole = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found is not None and found.rid == "r"
    assert ours < len(body) and whole > 20 * len(body)


@pytest.mark.parametrize("part", [b'"",', b"[],", b"{},"])
def test_a_list_of_too_many_prompts_is_refused(part: bytes) -> None:
    body = b'{"text": [' + part * 1_200_000 + part[:-1] + b"]}"
    with pytest.raises(TooMany):
        body_facts("/generate", body)
    body = b'{"messages": [' + b"{}," * 1_200_000 + b"{}]}"
    assert body_facts("/v1/chat/completions", body) is not None


def test_turns_of_a_conversation_have_the_same_beginning_and_others_do_not() -> None:
    system = {"role": "system", "content": "s" * 5000}

    def chat(*said: str) -> bytes:
        roles = [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in
                 enumerate(said)]  # fmt: skip
        return facts("/v1/chat/completions", {"messages": [system, *roles]}).beginning

    assert chat("a") == chat("a", "b", "c") != chat("x") and chat("a")
    text = "t" * 4000
    assert facts("/generate", {"text": text}) == facts("/generate", {"text": text + "more"})
    assert facts("/v1/completions", {"prompt": "a"}) != facts("/v1/completions", {"prompt": "b"})
    assert facts("/v1/responses", {"input": [{"role": "user", "content": "a"}]}).beginning
    assert facts("/generate", {}).beginning == b""


@pytest.mark.parametrize(
    "body",
    [b"{}", b' {"text": "x"} \n', b'{"bootstrap_room": 3, "text":"x", "a": 12345678901234567890}'],
)
def test_a_room_is_added_and_nothing_else_changed(body: bytes) -> None:
    prefill = Server("http://p:1", Role.PREFILL, bootstrap_port=9000)
    said = json.loads(body)
    known = body_facts("/generate", body)
    assert known is not None
    rooms = set()
    for _ in range(20):
        sent = with_fields(body, known, rendezvous(known, prefill))
        assert sent.startswith(body.rstrip()[:-1])
        got = json.loads(sent)
        rooms.add(got["bootstrap_room"])
        added = {"bootstrap_host": "p", "bootstrap_port": 9000}
        assert got == {**said, **added, "bootstrap_room": got["bootstrap_room"]}
    assert len(rooms) == 20 and all(0 <= room < LAST_ROOM for room in rooms)


@pytest.mark.parametrize("name", ROUTING_FIELDS)
def test_a_clients_own_routing_is_taken_back(name: str) -> None:
    escaped = name.replace("_", "\\u005f").encode()
    for body in (
        json.dumps({"text": "x", name: 3}).encode(),
        b'{"text": "x", "' + escaped + b'": "169.254.169.254"}',
        b'{"' + name.encode() + b'": 1, "' + escaped + b'": 2}',
    ):
        known = body_facts("/generate", body)
        assert known is not None and known.routing == (name,)
        assert json.loads(with_fields(body, known, without_routing(known)))[name] is None
    untouched = json.dumps({"text": name, name: None}).encode()
    known = body_facts("/generate", untouched)
    assert known is not None and with_fields(untouched, known, without_routing(known)) == untouched


def test_a_number_that_is_too_large_is_no_reason_to_look_no_further() -> None:
    found = body_facts("/generate", b'{"text": "x", "rid": "r", "sampling_params": {"a": 1e400}}')
    assert found is not None and (found.rid, found.generations) == ("r", 1)


def test_the_clients_name_of_a_request() -> None:
    assert facts("/generate", {"rid": "r"}).rid == "r"
    assert facts("/generate", {"rid": ["r", "s"]}).rid == "r"
    assert (
        facts("/generate", {}).rid is None and facts("/generate", {"rid": "x" * 70000}).rid is None
    )
