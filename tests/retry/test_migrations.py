"""A stream that another worker goes on with: the client sees one answer, the unbroken one."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from sglang_scaling_fixes.retry.trail import FIELD
from tests.retry.fake_worker import GARBAGE
from tests.retry.progress import run
from tests.retry.serving import PATHS, Answer, Proxy, fleet, post

TOKENS = 20
BREAKS: list[dict[str, Any]] = [
    {"fail": "close", "garbage": 0},
    {"fail": "truncate", "garbage": 0},
    {"fail": "no_done"},
    {"fail": "abort_event", "event": {"error": {"message": "x", "code": 503}}},
    {"fail": "comments"},
]
ALL = {"migrations": 1, "token_timeout": 0.4}


def said(plan: dict[str, Any], after: int = 11, names: str = "a") -> dict[str, Any]:
    plans = {name: {**plan, "after": after} for name in names}
    # The workers write the same tokens.
    return {"stream": True, "tokens": TOKENS, "mark": False, "plans": plans}


def without_names(answer: Answer) -> list[Any]:
    """Its events, as their clients read them."""
    found = []
    for event in answer.events:
        data = re.sub(rb"\b[abc]-\d+", b"NAME", event.partition(b"data: ")[2])
        found.append(json.loads(data) if data.startswith(b"{") else data)
    return found


async def unbroken(proxy: Proxy, path: str) -> list[Any]:
    return without_names(await post(proxy.url + path, said({})))


def error_of(answer: Answer) -> dict[str, Any]:
    events = [event for event in answer.events if b'"retryable"' in event]
    found = json.loads(events[-1].partition(b"data: ")[2])
    return dict(found.get("error") or found)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("plan", BREAKS)
def test_a_broken_stream_goes_on_unnoticed(path: str, plan: dict[str, Any]) -> None:
    async def test() -> None:
        async with fleet("ab", **ALL) as (proxy, (a, b)):
            answer = await post(proxy.url + path, said(plan))
            assert without_names(answer) == await unbroken(proxy, path)
            names = {*re.findall(rb"\b[ab]-\d+", answer.body)}
            assert len(names) == (0 if path == "/v1/messages" else 1)
            assert FIELD.encode() not in answer.body
            (first,), second = a.generations[:1], b.generations[0]
            assert first.said[FIELD]["output_ids"] == []
            assert second.said[FIELD]["output_ids"] == [1000 + i for i in range(10)]
            counts = await proxy.scrape()
            assert counts['requests_total{outcome="recovered"}'] == 1
            assert [n for name, n in counts.items() if name.startswith("migrations_total")] == [1]
        async with fleet("ab", token_timeout=0.4) as (proxy, _):  # control
            answer = await post(proxy.url + path, said(plan))
            assert error_of(answer)["retryable"] is True

    run(test)


@pytest.mark.parametrize("path", PATHS)
def test_what_an_anomaly_spoiled_is_written_again(path: str) -> None:
    async def test(trail: int, repaired: bool) -> None:
        plan = {"fail": "anomaly", "rule": "low_accept_length", "suspect_from": 8}
        async with fleet("ab", migrations=1, trail_tokens=trail) as (proxy, (_a, b)):
            if path != "/generate":  # the fake worker says the rest in this API only
                plan = {"fail": "anomaly"}
            answer = await post(proxy.url + path, said(plan))
            if repaired and path == "/generate":
                assert without_names(answer) == await unbroken(proxy, path)
                assert b.generations[0].said[FIELD]["output_ids"] == [1000 + i for i in range(7)]
                assert b.generations[0].said["extra_key"].startswith("ssf.fresh.")
            elif not repaired:
                assert GARBAGE.encode() in answer.body
                assert "kv_anomaly" in json.dumps(error_of(answer))

    run(lambda: test(6, True))
    run(lambda: test(0, False))  # control: the client has the garbage already


def test_an_anomaly_of_the_whole_answer_is_begun_anew_while_the_client_has_nothing() -> None:
    async def test(trail: int) -> None:
        plan = {"fail": "anomaly", "rule": "low_accept_length", "suspect_from": 0}
        async with fleet("ab", migrations=1, trail_tokens=trail) as (proxy, (_, b)):
            answer = await post(proxy.url + "/generate", said(plan))
            if b.generations:
                assert b.generations[0].said[FIELD]["output_ids"] == []
                assert without_names(answer) == await unbroken(proxy, "/generate")
            else:
                assert error_of(answer)["type"] == "kv_anomaly"
            assert bool(b.generations) is (trail > 11)

    run(lambda: test(15))
    run(lambda: test(6))


def test_a_worker_without_the_fix_serves_as_ever_and_the_error_says_why() -> None:
    async def test() -> None:
        async with fleet("ab", migrations=1, trail_tokens=4) as (proxy, (a, b)):
            a.resumes = b.resumes = None
            answer = await post(proxy.url + "/generate", said({"fail": "close"}))
            error = error_of(answer)
            assert error["retryable"] is True and "fix resume" in error["message"]
            assert not b.generations

    run(test)


def test_a_worker_that_cannot_go_on_is_not_let_begin_anew() -> None:
    async def test() -> None:
        async with fleet("ab", migrations=2) as (proxy, (_, b)):
            b.resumes = None
            answer = await post(proxy.url + "/generate", said({"fail": "close"}))
            assert b.generations and "error" in json.dumps(error_of(answer))
            assert answer.body.count(b'"text": "0 "') == 1

    run(test)


def test_a_request_that_cannot_be_resumed_is_served_without() -> None:
    async def test() -> None:
        async with fleet("ab", migrations=1) as (proxy, (a, b)):
            a.resumes = b.resumes = False
            answer = await post(proxy.url + "/generate", said({"fail": "close"}))
            assert [FIELD in one.said for one in a.generations] == [True, False]
            assert "cannot resume a request of this kind" in error_of(answer)["message"]
            good = await post(proxy.url + "/generate", said({}))
            assert good.events[-1] == b"data: [DONE]"
            # Whole answers and several answers never ask for it.
            several = {**said({"fail": "close"}, names="ab"), "sampling_params": {"n": 2}}
            assert (
                "several answers"
                in error_of(await post(proxy.url + "/generate", several))["message"]
            )
            await post(proxy.url + "/generate", {"tokens": 2})
            assert FIELD not in (a.generations + b.generations)[-1].said

    run(test)


def test_a_stream_that_loses_two_workers_ends_with_an_error() -> None:
    async def test() -> None:
        async with fleet("abc", migrations=5) as (proxy, (a, b, c)):
            answer = await post(
                proxy.url + "/generate", said({"fail": "close", "garbage": 0}, names="abc")
            )
            assert error_of(answer)["type"] == "worker_lost"
            assert sorted(len(w.generations) for w in (a, b, c)) == [0, 1, 1]

    run(test)


def test_a_hundred_streams_survive_a_worker_that_ends() -> None:
    async def test() -> None:
        async with fleet("abc", migrations=1) as (proxy, (a, _, _)):
            right = await unbroken(proxy, "/v1/chat/completions")
            slow = {**said({}), "delay": 0.05}
            asked = [
                asyncio.create_task(post(proxy.url + "/v1/chat/completions", {**slow, "x": i}))
                for i in range(100)
            ]
            while len(a.generations) < 30 or a.sent < 20_000:
                await asyncio.sleep(0.02)
            await a.__aexit__()
            answers = await asyncio.gather(*asked)
            assert all(without_names(answer) == right for answer in answers)
            assert (await proxy.scrape())['requests_total{outcome="recovered"}'] >= 30

    run(test)
