"""Streams through the real proxy from workers that misbehave: one beginning, no garbage."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.retry.fake_worker import ANOMALY, FakeWorker
from tests.retry.progress import eventually, run
from tests.retry.serving import PATHS, Answer, post, proxying


def ask(fail: str = "", after: int = 5, **more: Any) -> dict[str, Any]:
    plans = {"a": {"fail": fail, "after": after}} if fail else {}
    return {"stream": True, "tokens": 12, "plans": plans, **more}


def beginnings(answer: Answer) -> set[str]:
    """The workers whose first token the client was given."""
    return {name for name in "abc" if f"{name}:0 ".encode() in answer.body}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hold", [0, 5, 50])
def test_a_good_stream_is_the_workers_own_byte_for_byte(path: str, hold: int) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, proxying([a], hold_tokens=hold) as proxy:
            direct = await post(a.url + path, ask())
            through = await post(proxy.url + path, ask())
            assert through.body == direct.body and through.status == direct.status
            hop_by_hop = (b"Transfer-Encoding", b"chunked")
            direct.headers.remove(hop_by_hop)
            through.headers = [h for h in through.headers if h[0].lower() != b"transfer-encoding"]
            assert through.headers == direct.headers

    run(test)


FAILURES = ["anomaly", "close", "truncate", "no_done"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fail", FAILURES)
def test_what_fails_while_held_back_is_made_good_unnoticed(path: str, fail: str) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b], hold_tokens=8) as proxy:
                answer = await post(proxy.url + path, ask(fail))
                counts = await proxy.scrape()
            assert answer.body == (await post(b.url + path, ask())).body
            assert beginnings(answer) == {"b"} and b"GARBAGE" not in answer.body
            (first,), second = a.generations, b.generations[0]
            retried = dict(second.said)
            # An anomaly gets a second opinion: the retry computes its prompt afresh.
            fresh = fail == "anomaly" and path != "/v1/messages"
            assert retried.pop("extra_key", "").startswith("ssf.fresh.") is fresh
            assert retried == first.said and (fresh or first.body == second.body)
            assert counts["stream_restarts_total"] == 1
            assert counts['requests_total{outcome="recovered"}'] == 1
            # Control: the worker alone does all this to its client.
            alone = await post(a.url + path, ask(fail))
            assert beginnings(alone) == {"a"} and b"12" not in alone.body
            assert (b"GARBAGE" in alone.body) == (fail in ("anomaly", "close", "truncate"))

    run(test)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fail", FAILURES)
def test_what_fails_later_ends_the_stream_with_one_error(path: str, fail: str) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, proxying([a, b]) as proxy:
            answer = await post(proxy.url + path, ask(fail))
            direct = await post(a.url + path, ask(fail))
            counts = await proxy.scrape()
        assert answer.complete and answer.status == 200 and beginnings(answer) == {"a"}
        assert not b.generations
        sent = [event for event in answer.events if event != b"data: [DONE]"]
        # All of the worker's whole events, but not the one of the abort; then the error.
        assert sent[:-1] == direct.events[:5]
        data = sent[-1].partition(b"data: ")[2]
        told = json.loads(data)
        error = told if path == "/v1/responses" else told["error"]
        kind = "kv_anomaly" if fail == "anomaly" else "worker_lost"
        assert kind in (error["type"], error.get("code")) and error["retryable"] is True
        assert answer.body.count(kind.encode()) <= 2
        if path == "/v1/responses":
            assert error["sequence_number"] == 5
        if path in ("/v1/responses", "/v1/messages"):
            assert sent[-1].startswith(b"event: error\n")
        else:
            assert answer.events[-1] == b"data: [DONE]" and error["code"] == 503
        assert counts['requests_total{outcome="broken"}'] == 1
        reason = "anomaly" if fail == "anomaly" else "lost"
        assert counts[f'retries_total{{outcome="told",reason="{reason}"}}'] == 1
        anomalies = [n for name, n in counts.items() if name.startswith("anomalies_total{")]
        assert anomalies == ([1.0] if fail == "anomaly" else [])

    run(test)


def test_a_stream_that_fails_at_once_restarts_without_any_hold_back() -> None:
    """The status has not been sent before the first event."""

    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, proxying([a, b]) as proxy:
            for fail in FAILURES:
                answer = await post(proxy.url + "/generate", ask(fail, after=0))
                assert beginnings(answer) <= {"a", "b"} and answer.events[-1] == b"data: [DONE]"
                assert b"error" not in answer.body
        assert a.generations

    run(test)


STOCK_ERRORS: list[dict[str, Any]] = [
    {"error": {"object": "error", "type": "kv_anomaly", "message": ANOMALY, "code": 503}},
    {"error": {"object": "error", "type": "InternalServerError", "message": "x", "code": 503}},
    {"error": {"object": "error", "type": "SERVICE_UNAVAILABLE", "message": "x", "code": "503"}},
    {"error": {"message": "x", "type": "invalid_request_error", "code": 503, "retryable": False}},
    {"meta_info": {"finish_reason": {"type": "abort", "status_code": 502, "message": "x"}}},
    {"meta_info": {"finish_reason": {"type": "abort", "status_code": 504, "message": "x"}}},
    {"object": "error", "type": "kv_anomaly", "message": ANOMALY, "code": 503},
    {"error": {"object": "error", "type": "InternalServerError", "message": "x", "code": 500}},
    {"meta_info": {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}},
]
CLIENTS_OWN: list[dict[str, Any]] = [
    {"error": {"object": "error", "type": "BadRequestError", "message": "x", "code": 400}},
    {"error": {"object": "error", "type": "NotImplementedError", "message": "x", "code": 501}},
    {"meta_info": {"finish_reason": {"type": "abort", "status_code": 400, "message": "too long"}}},
]


@pytest.mark.parametrize("event", STOCK_ERRORS)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_every_way_to_say_not_here_is_retried(path: str, event: dict[str, Any]) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b], hold_tokens=8) as proxy:
                plans = {"a": {"fail": "abort_event", "after": 3, "event": event}}
                answer = await post(proxy.url + path, ask(plans=plans))
            assert beginnings(answer) == {"b"} and len(a.generations) == 1

    run(test)


@pytest.mark.parametrize("event", CLIENTS_OWN)
def test_an_error_that_is_the_clients_own_passes(event: dict[str, Any]) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b], hold_tokens=8) as proxy:
                plans = {"a": {"fail": "abort_event", "after": 3, "event": event}}
                answer = await post(proxy.url + "/generate", ask(plans=plans))
            assert beginnings(answer) == {"a"} and not b.generations
            assert json.dumps(event).encode() in answer.body

    run(test)


def test_with_one_attempt_a_failure_is_told_and_not_made_good() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b], hold_tokens=8, attempts=1) as proxy:
                answer = await post(proxy.url + "/generate", ask("anomaly"))
            assert answer.status == 503 and answer.error["type"] == "kv_anomaly"
            assert answer.error["retryable"] is True and answer.header(b"retry-after") == b"1"
            assert not b.generations

    run(test)


def test_nothing_flows_before_the_tokens_are_there() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, proxying([a], hold_tokens=8) as proxy:
            url = proxy.url + "/v1/chat/completions"
            body = json.dumps(ask("hang", after=7)).encode()
            async with aiohttp.ClientSession() as session:
                waiting = asyncio.create_task(session.post(url, data=body))
                await eventually(lambda: a.sent > 7 * 40 and proxy.app.budget.held > 7 * 40)
                await asyncio.sleep(0.1)
                assert not waiting.done()
                waiting.cancel()
                # One token more, and it does.
                body = json.dumps(ask("hang", after=8)).encode()
                async with session.post(url, data=body) as response:
                    assert (await response.content.readline()).startswith(b"data: ")

    run(test)


def test_every_generation_of_a_stream_is_held_back() -> None:
    """Two samples: the second has no tokens yet, so that nothing may go out."""

    async def test() -> None:
        async with (
            FakeWorker("a") as a,
            FakeWorker("b") as b,
            proxying([a, b], hold_tokens=4) as proxy,
        ):
            said = ask("anomaly", after=9, n=2)
            answer = await post(proxy.url + "/v1/chat/completions", said)
            assert beginnings(answer) == {"b"}
            # Control: one sample has had its tokens by then.
            said = {**said, "plans": {n: {"fail": "anomaly", "after": 9} for n in "ab"}}
            answer = await post(proxy.url + "/v1/chat/completions", {**said, "n": 1})
            assert answer.status == 200 and b"retryable" in answer.body

    run(test)


def test_more_held_back_than_allowed_ends_the_attempt() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b], hold_tokens=10, hold_bytes=20_000) as proxy:
                answer = await post(proxy.url + "/generate", ask(size=5000))
                assert answer.status == 503 and answer.error["type"] == "held_too_large"
                assert answer.error["retryable"] is False
                assert len(a.generations) + len(b.generations) == 1
            async with proxying([a, b], hold_tokens=10, max_held_bytes=20_000) as proxy:
                answer = await post(proxy.url + "/generate", ask(size=5000))
                assert answer.status == 503 and answer.error["type"] == "overloaded"
                assert answer.error["retryable"] is True
                assert proxy.app.budget.held == 0
            # Control: with room for it, it is an ordinary stream.
            async with proxying([a, b], hold_tokens=10) as proxy:
                assert (await post(proxy.url + "/generate", ask(size=5000))).status == 200

    run(test)
