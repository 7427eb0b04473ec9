"""What goes through to which workers, and what is asked of how many. Each with its control."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sglang_scaling_fixes import vouch
from sglang_scaling_fixes.retry import retries
from sglang_scaling_fixes.retry.workers import Worker, Workers
from tests.retry.fake_worker import SECRET, FakeWorker
from tests.retry.progress import eventually, run
from tests.retry.serving import NAMES, everywhere, fleet, innocent, post, proxying

# What goes through


def test_a_client_cannot_say_where_its_request_goes() -> None:
    async def test() -> None:
        async with fleet("a") as (proxy, (a,)):
            said = {
                "bootstrap_host": "169.254.169.254",
                "bootstrap_room": 1,
                "routed_dp_rank": 3,
                "data_parallel_rank": 3,
            }
            headers = {"X-Data-Parallel-Rank": "3", "X-Override-Routed-DP-Rank": "3"}
            assert (await post(proxy.url + "/generate", said, headers)).status == 200
            seen = a.generations[0]
            assert {seen.said[name] for name in said} == {None}
            assert not {"x-data-parallel-rank", "x-override-routed-dp-rank"} & {
                name.lower() for name, _ in seen.headers
            }
            # What only a lenient reader understands is refused: it might hold anything.
            lenient = b'{"bootstrap_host": "x", "a": NaN}'
            assert (await post(proxy.url + "/generate", lenient)).status == 400

    run(test)


def test_a_redirect_shows_no_worker() -> None:
    async def test() -> None:
        async with fleet("a") as (proxy, (a,)):
            plan = {"fail": "status", "status": 307, "location": a.url + "/generate/"}
            body = json.dumps({"plans": {"a": plan}}).encode()
            async with (
                aiohttp.ClientSession() as session,
                session.post(proxy.url + "/generate", data=body, allow_redirects=False) as answer,
            ):
                assert answer.status == 307 and answer.headers["Location"] == "/generate/"

    run(test)


def test_errors_of_the_proxy_can_be_read_by_a_browser_and_named() -> None:
    async def test() -> None:
        async with fleet("a", max_body_bytes=10) as (proxy, (a,)):
            origin = {"Origin": "https://ui", "X-Request-Id": "mine"}
            large = await post(proxy.url + "/generate", b"x" * 11, origin)
            assert large.status == 413
            assert large.header(b"access-control-allow-origin") == b"*"
            good = await post(proxy.url + "/generate", b"{}", origin)
            assert good.name == "mine" == dict(a.generations[0].headers)["x-request-id"]
            made = await post(proxy.url + "/generate", b"{}")
            assert made.name and dict(a.generations[1].headers)["x-request-id"] == made.name
            trace = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"}
            await post(proxy.url + "/generate", b"{}", trace)
            assert dict(a.generations[2].headers)["traceparent"] == trace["traceparent"]

    run(test)


# One call is not nine generations


def secret_file(folder: Path) -> str:
    path = folder / "secret"
    path.write_bytes(SECRET)
    return str(path)


@pytest.mark.parametrize("stream", [False, True])
def test_two_guards_that_agree_are_overruled_by_a_third_attempt(
    stream: bool, tmp_path: Path
) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            options: dict[str, Any] = {"secret_file": secret_file(tmp_path), "hold_tokens": 8}
            async with proxying([a, b], **options) as proxy:
                said = everywhere("anomaly", rule="high_accept_rate", listens=True)
                answer = await post(proxy.url + "/generate", {**said, "stream": stream})
                assert answer.status == 200 and b"kv_anomaly" not in answer.body
                keys = [s.said.get("extra_key", "") for w in (a, b) for s in w.generations]
                kinds = [key.split(".")[1] if key else "" for key in keys]
                assert sorted(kinds) == ["", vouch.FRESH, vouch.UNGUARDED]
                assert len(set(keys)) == 3
                await eventually(lambda: bool(a.withdrawn and b.withdrawn))
                word = vouch.Word(vouch.FALSE_ALARM, "high_accept_rate-1")
                assert a.withdrawn == b.withdrawn == [word]
                assert (await proxy.scrape())["false_alarms_total"] == 1

    run(test)


def test_without_a_secret_the_client_is_told_not_to_ask_again() -> None:
    async def test() -> None:
        async with fleet("abc") as (proxy, (a, b, c)):
            said = everywhere("anomaly", rule="high_accept_rate", listens=True)
            answer = await post(proxy.url + "/generate", said)
            assert answer.status == 503 and answer.error["type"] == "kv_anomaly"
            assert answer.error["retryable"] is False
            assert answer.header(b"x-should-retry") == b"false"
            assert answer.header(b"retry-after")
            assert sum(len(w.generations) for w in (a, b, c)) == 2
            # Control: they do not agree if each says something else.
            for name in NAMES:
                said["plans"][name]["rule"] = f"rule_{name}"
            answer = await post(proxy.url + "/generate", said)
            assert answer.error["retryable"] is True
            assert sum(len(w.generations) for w in (a, b, c)) == 2 + 3

    run(test)


def test_a_client_cannot_vouch_for_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with fleet("ab", attempts=2, secret_file=secret_file(tmp_path)) as (proxy, _):
            forged = vouch.vouch(b"x" * 16, vouch.UNGUARDED, "n", 1 << 40)
            said = everywhere("anomaly", rule="high_accept_rate", listens=True)
            answer = await post(proxy.url + "/generate", {**said, "extra_key": forged})
            assert answer.status == 503

    run(test)


def test_a_fleet_that_refuses_is_not_asked_three_times_by_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(least: int) -> int:
        monkeypatch.setattr(retries, "LEAST", least)
        async with fleet("abc") as (proxy, (a, b, c)):
            said = everywhere("status")
            await asyncio.gather(*(post(proxy.url + "/generate", said) for _ in range(60)))
            counts = await proxy.scrape()
            assert bool(counts["retries_refused_total"]) is (least < 60)
            return sum(len(w.generations) for w in (a, b, c))

    arrivals: list[int] = []

    async def both() -> None:
        arrivals.append(await test(1))
        arrivals.append(await test(10_000))  # control

    run(both)
    assert arrivals[0] < 120 and arrivals[1] == 180


# What a failure looks like


def test_a_prefill_that_aborts_with_a_200_fails_the_pair() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, FakeWorker("c") as c:
            pair = f"prefill={a.url},decode={b.url}"
            async with (
                FakeWorker("d") as d,
                proxying([], [pair, f"prefill={c.url},decode={d.url}"]) as proxy,
            ):
                body = {"text": "", "meta_info": {"finish_reason": {"type": "abort"}}}
                plans = {
                    "a": {"fail": "status", "status": 200, "body": body},
                    "b": {"fail": "hang"},
                }
                answer = await post(proxy.url + "/generate", {"tokens": 2, "plans": plans})
                assert answer.status == 200 and b"d:0" in answer.body

    run(test)


@pytest.mark.parametrize("after", [0, 3])
def test_comments_are_no_answer(after: int) -> None:
    async def test(seconds: float) -> None:
        options = {"first_token_timeout": seconds, "token_timeout": seconds, "hold_tokens": 8}
        async with fleet("ab", **options) as (proxy, _):
            plans = {"a": {"fail": "comments", "after": after}}
            said = {"stream": True, "tokens": 9, "plans": plans}
            asked = asyncio.create_task(post(proxy.url + "/generate", said))
            if seconds < 3600:
                answer = await asked
                assert b"b:0" in answer.body and answer.events[-1] == b"data: [DONE]"
            else:  # control: what a time-out for bytes sees
                await asyncio.sleep(1.0)
                assert not asked.done()
                asked.cancel()

    run(lambda: test(0.3))
    run(lambda: test(3600.0))


def test_a_worker_that_says_not_even_headers_is_given_up_in_time() -> None:
    """Stock sends the headers of a chat's stream with its first token. An answer that is no stream
    has no first token, and may take longer."""

    async def test() -> None:
        async with fleet("ab", first_token_timeout=0.3, idle_timeout=60) as (proxy, (a, b)):
            a.plan = b.plan = {"fail": "hang"}
            told = await post(proxy.url + "/generate", {"tokens": 3, "stream": True})
            assert told.error["type"] == "worker_timeout", told
            b.plan = {}
            found = await post(proxy.url + "/generate", {"tokens": 5, "stream": True})
            assert found.events[-1] == b"data: [DONE]"
            a.plan = {}
            whole = await post(proxy.url + "/generate", {"tokens": 3, "delay": 0.6})
            assert whole.status == 200

    run(test)


def test_what_is_handed_on_as_an_error_is_never_ok() -> None:
    async def test() -> None:
        async with fleet("a", retry_status="503") as (proxy, _):
            expected = {"rejected": 0, "failed": 0, "ok": 0, "broken": 0}
            for status, outcome in ((400, "rejected"), (429, "rejected"), (500, "failed")):
                plans = {"a": {"fail": "status", "status": status, "body": {"error": {}}}}
                assert (await post(proxy.url + "/generate", {"plans": plans})).status == status
                expected[outcome] += 1
            abort = {"type": "abort", "status_code": 400, "message": "too long"}
            for body, outcome in (
                ({"meta_info": {"finish_reason": abort}}, "rejected"),
                ({"error": {"message": "x", "code": 501}}, "failed"),
                ({"text": '"error"', "meta_info": {"finish_reason": {"type": "stop"}}}, "ok"),
            ):
                plans = {"a": {"fail": "status", "status": 200, "body": body}}
                assert (await post(proxy.url + "/generate", {"plans": plans})).status == 200
                expected[outcome] += 1
            for code, outcome in ((400, "rejected"), (500, "broken")):
                event = {"error": {"message": "x", "code": code}}
                plans = {"a": {"fail": "abort_event", "after": 2, "event": event}}
                await post(proxy.url + "/generate", {"stream": True, "plans": plans})
                expected[outcome] += 1
            counts = await proxy.scrape()
            found = {name: counts[f'requests_total{{outcome="{name}"}}'] for name in expected}
            assert found == expected

    run(test)


# Pools


def test_a_pool_loses_a_prefill_and_no_request() -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            p, q, r, d, e = [await stack.enter_async_context(FakeWorker(n)) for n in "pqrde"]
            pool = proxying(prefills=[p, q, r], decodes=[d, e])
            proxy = await stack.enter_async_context(pool)
            plans = {"p": {"fail": "close"}}
            for number in range(40):  # of so many chats each prefill has some
                said = {"tokens": 2, "text": f"chat {number}", "plans": plans}
                assert (await post(proxy.url + "/generate", said)).status == 200
            assert p.generations and q.generations and r.generations
            assert d.generations and e.generations

    run(test)


def test_the_last_worker_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with every break a verdict, there is nobody left to ask."""

    def verdict(self: Workers, worker: Worker, now: float) -> None:
        self._take_down(worker, now)

    async def test() -> None:
        async with fleet("a", refuse_seconds=0) as (proxy, _):
            for number in range(6):
                await post(proxy.url + "/generate", {**everywhere("close"), "number": number})
            assert proxy.app.workers.live(0.0) and await innocent(proxy) == [200] * 4
            monkeypatch.setattr(Workers, "broke", verdict)
            await post(proxy.url + "/generate", everywhere("close"))
            assert not proxy.app.workers.live(0.0)

    run(test)
