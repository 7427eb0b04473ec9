"""Prefill/decode pairs: both halves are told where to meet, and fail together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sglang_scaling_fixes.reclaim import retry_after
from sglang_scaling_fixes.retry import pair
from tests.retry.fake_worker import FakeWorker
from tests.retry.progress import eventually, run
from tests.retry.serving import Proxy, get, post, proxying

Four = tuple[FakeWorker, FakeWorker, FakeWorker, FakeWorker]
ROOMS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


@asynccontextmanager
async def two_pairs(**options: Any) -> AsyncIterator[tuple[Proxy, Four]]:
    async with (
        FakeWorker("p") as p,
        FakeWorker("d") as d,
        FakeWorker("q") as q,
        FakeWorker("e") as e,
        proxying(
            [],
            [
                f"prefill={p.url},decode={d.url}",
                f"prefill={q.url},decode={e.url},bootstrap-port=9000",
            ],
            **options,
        ) as proxy,
    ):
        yield proxy, (p, d, q, e)


def test_both_halves_get_the_same_room_and_the_clients_bytes() -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (p, d, q, e)):
            body = b'{"x": "x",  "stream": true, "sampling_params": {"seed": 3}}\n'
            first = await post(proxy.url + "/generate", body)
            second = await post(proxy.url + "/generate", body)
            assert b"d:0" in first.body and b"e:0" in second.body
            assert p.generations[0].body == d.generations[0].body != body
            assert d.generations[0].body.startswith(body.rstrip()[:-1])
            said = d.generations[0].said
            assert (said["bootstrap_host"], said["bootstrap_port"]) == ("127.0.0.1", 8998)
            assert 0 <= said["bootstrap_room"] < 2**63
            assert e.generations[0].said["bootstrap_port"] == 9000
            assert e.generations[0].said["bootstrap_room"] != said["bootstrap_room"]
            assert q.generations[0].body == e.generations[0].body
            while (counts := await proxy.scrape())["inflight"]:
                await asyncio.sleep(0.01)
            assert counts['requests_total{outcome="ok"}'] == 2

    run(test)


def test_a_prefill_that_ends_after_its_decode_is_let_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client leaves as soon as it has decode's answer; nobody has failed."""
    monkeypatch.setattr(pair, "PREFILL_GRACE_S", 3600.0)

    async def test() -> None:
        async with two_pairs() as (proxy, (p, *_)):
            said = {"stream": True, "tokens": 5, "plans": {"p": {"late": True}}}
            answer = await post(proxy.url + "/generate", said)
            assert answer.events[-1] == b"data: [DONE]" and p.sent < 1000
            assert (await proxy.scrape())["inflight"] == 1
            p.may_end.set()
            while (counts := await proxy.scrape())["inflight"]:
                await asyncio.sleep(0.01)
            assert counts['requests_total{outcome="ok"}'] == 1
            assert not p.generations[0].hung_up.is_set()

    run(test)


def test_a_prefill_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "PREFILL_GRACE_S", 0.1)

    async def test() -> None:
        async with two_pairs() as (proxy, (p, *_)):
            said = {"stream": True, "tokens": 5, "plans": {"p": {"late": True}}}
            answer = await post(proxy.url + "/generate", said)
            assert answer.events[-1] == b"data: [DONE]"
            await eventually(p.generations[0].hung_up.is_set)
            while (counts := await proxy.scrape())["inflight"]:
                await asyncio.sleep(0.01)
            assert counts['requests_total{outcome="ok"}'] == 1

    run(test)


@pytest.mark.parametrize(
    ("path", "prompts"),
    [
        ("/generate", {"text": ["x", "y", "z"]}),
        ("/generate", {"input_ids": [[1], [2], [3]]}),
        ("/v1/completions", {"prompt": ["x", "y", "z"]}),
        ("/v1/completions", {"prompt": [[1], [2], [3]]}),
    ],
)
def test_a_list_of_prompts_gets_a_list_of_rooms(path: str, prompts: dict[str, Any]) -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (*first, q, e)):
            assert (await post(proxy.url + path, prompts)).status == 200
            p, d = (q, e) if e.generations else first  # which pair depends on the prompt
            assert [len(d.generations[0].said[name]) for name in ROOMS] == [3, 3, 3]
            assert len(set(d.generations[0].said["bootstrap_room"])) == 3
            assert p.generations[0].body == d.generations[0].body

    run(test)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_one_prompt_of_token_ids_is_not_a_list(path: str) -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (_, d, _, e)):
            said = {"input_ids": [1, 2]} if path == "/generate" else {"prompt": [1, 2]}
            await post(proxy.url + path, said)
            decode = d if d.generations else e  # which one depends on the prompt
            assert isinstance(decode.generations[0].said["bootstrap_room"], int)

    run(test)


@pytest.mark.parametrize("bad", ["p", "d"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "plan",
    [
        {"fail": "status"},
        {"fail": "close"},
        {"fail": "anomaly"},
        {"fail": "status", "status": 502, "body": ""},
    ],
)
def test_either_half_fails_the_pair(bad: str, stream: bool, plan: dict[str, Any]) -> None:
    """The other half of it would hang for ever, and does where nobody watches its partner."""

    async def test() -> None:
        async with two_pairs() as (proxy, (p, d, q, e)):
            good = {"p": "d", "d": "p"}[bad]
            said = {"stream": stream, "plans": {bad: plan, good: {"fail": "hang"}}}
            answer = await post(proxy.url + "/generate", said)
            assert answer.status == 200 and b"e:0" in answer.body and b"d:0" not in answer.body
            hanging = d if bad == "p" else p
            await eventually(hanging.generations[0].hung_up.is_set)
            rooms = [w.generations[0].said["bootstrap_room"] for w in (p, d, q, e)]
            assert rooms[0] == rooms[1] != rooms[2] == rooms[3]

    run(test)


def test_a_prefill_that_refuses_answers_the_client_at_once() -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (_p, d, q, _)):
            plan = {"fail": "status", "status": 400, "body": {"error": {"message": "too long"}}}
            said = {"plans": {"p": plan, "d": {"fail": "hang"}}}
            answer = await post(proxy.url + "/generate", said)
            assert answer.status == 400 and answer.error == {"message": "too long"}
            await eventually(d.generations[0].hung_up.is_set)
            assert not q.generations

    run(test)


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_prefill_that_refuses_after_decode_said_that_it_ended_answers_the_client(
    stream: bool, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode hears of a refusal from prefill itself, perhaps before prefill's answer is here.

    `knows`: the proxy knows the words. Without them it asks the next pair, in vain.
    """
    monkeypatch.setattr(pair, "PREFILL_GRACE_S", 3600.0)
    if not knows:
        monkeypatch.setattr(pair, "ENDED", "other words")

    async def test() -> None:
        async with two_pairs() as (proxy, (p, d, _, e)):
            words = f"{retry_after.ENDED} (too long): retry the request"
            refuses = {"fail": "status", "status": 400, "late": True}
            plans = {
                "p": {**refuses, "body": {"error": {"message": "too long"}}},
                "d": {"fail": "status", "status": 503, "body": {"error": {"message": words}}},
            }
            asked = post(proxy.url + "/generate", {"stream": stream, "plans": plans})
            client = asyncio.create_task(asked)
            await eventually(lambda: d.sent > 0)
            if knows:
                p.may_end.set()
            answer = await client
            assert (answer.status, bool(e.generations)) == ((400, False) if knows else (200, True))
            assert not knows or answer.error == {"message": "too long"}

    run(test)


def test_a_prefill_lost_after_its_work_does_not_matter() -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (p, _, q, _)):
            said = {"stream": True, "delay": 0.05, "plans": {"p": {"fail": "close", "after": 4}}}
            answer = await post(proxy.url + "/generate", said)
            assert answer.events[-1] == b"data: [DONE]" and b"error" not in answer.body
            assert p.generations and not q.generations

    run(test)


def test_a_client_that_leaves_frees_both_halves() -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (p, d, _, _)):
            said = {"plans": {"p": {"fail": "hang"}, "d": {"fail": "hang"}}}
            client = asyncio.create_task(post(proxy.url + "/generate", said))
            await eventually(lambda: bool(p.generations and d.generations))
            client.cancel()
            await eventually(p.generations[0].hung_up.is_set)
            await eventually(d.generations[0].hung_up.is_set)

    run(test)


def test_what_a_pair_cannot_do() -> None:
    async def test() -> None:
        async with two_pairs() as (proxy, (p, d, _, _)):
            assert (await post(proxy.url + "/v1/embeddings", {})).status == 501
            assert (await post(proxy.url + "/generate", b"[1]")).status == 400
            encoded = {"Content-Encoding": "gzip"}
            assert (await post(proxy.url + "/generate", b"x", encoded)).status == 415
            assert not p.generations and not d.generations
            assert json.loads((await get(proxy.url + "/v1/models")).body) == {"worker": "d"}
            assert (await post(proxy.url + "/tokenize", {"prompt": "x"})).status == 200
        async with FakeWorker("p") as p, FakeWorker("d") as d, FakeWorker("w") as w:
            both = f"prefill={p.url},decode={d.url}"
            async with proxying([w], [both]) as proxy:
                for _ in range(3):
                    assert (await post(proxy.url + "/v1/embeddings", {})).status == 200
                assert len(w.generations) == 3 and not p.generations

    run(test)
