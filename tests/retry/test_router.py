"""Workers behind one stock router: a retry after an anomaly does not come back to who spoiled it.

"Another worker" is the router's choice then. What it takes from us is the 503: its own breaker
counts it. It passes on neither headers of ours nor, in chat, an `extra_key`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.retry.fake_worker import ANOMALY, FakeWorker
from tests.retry.progress import run
from tests.retry.serving import Answer, front, post, proxying
from tests.retry.test_requests import free_port

pytest.importorskip("sglang_router")

ONE_STRIKE = ("--cb-failure-threshold", "1", "--cb-timeout-duration-secs", "30")
"""What docs/retry-proxy.md tells the operator of such a router to set."""
ASKED = 6


@contextlib.asynccontextmanager
async def router(*flags: str) -> AsyncIterator[str]:
    """The real one."""
    ports = ("--prometheus-port", str(free_port()), "--retry-initial-backoff-ms", "1")
    command = ("sglang_router.launch_router", *ports, *flags)
    async with front(*command, port=free_port(), ready="/readiness") as url:
        yield url


class Spoiling(FakeWorker):
    """Its guard ends every request."""

    async def _answer(self, one: Any, writer: asyncio.StreamWriter) -> bool:
        if one.method != "POST":
            return await super()._answer(one, writer)
        error = {"error": {"type": "kv_anomaly", "message": ANOMALY}}
        return await self._refuse("status", {"body": error}, writer)


async def ask(url: str, said: dict[str, Any]) -> Answer:
    return await post(url + "/generate", said, {"Content-Type": "application/json"})


async def ask_all(url: str, spoiling: Spoiling) -> tuple[list[int], list[int]]:
    """Statuses of some requests, and how often the spoiling worker was asked for each."""
    statuses, asked = [], []
    for number in range(ASKED):
        before = posts(spoiling)
        answer = await ask(url, {"text": f"chat {number % 2}", "stream": False})
        statuses.append(answer.status)
        asked.append(posts(spoiling) - before)
    return statuses, asked


def posts(worker: FakeWorker) -> int:
    return sum(one.method == "POST" for one in worker.seen)


def check(found: tuple[list[int], list[int]], strict: bool) -> None:
    statuses, asked = found
    if strict:
        assert statuses == [200] * ASKED and sum(asked) <= 1
    else:  # control: as the router comes
        assert max(asked) > 1 or sum(asked) > 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_retry_does_not_reach_the_worker_that_spoiled_the_answer(strict: bool) -> None:
    async def test() -> None:
        async with Spoiling("a") as bad, FakeWorker("b") as good:
            for urls in ((bad.url, good.url), (good.url, bad.url)):
                bad.seen.clear()
                flags: Sequence[str] = ONE_STRIKE if strict else ()
                async with router("--policy", "round_robin", "--worker-urls", *urls, *flags) as url:
                    check(await ask_all(url, bad), strict)

    run(test)


@pytest.mark.parametrize("strict", [True, False])
def test_nor_the_decode_of_a_pool(strict: bool) -> None:
    """With two prefills: of a pair that failed the router doubts both halves."""

    async def test() -> None:
        async with (
            FakeWorker("p") as p,
            FakeWorker("q") as q,
            Spoiling("d") as bad,
            FakeWorker("e") as good,
        ):
            pool = ["--pd-disaggregation", "--policy", "round_robin"]
            pool += ["--prefill", p.url, "8998", "--prefill", q.url, "8999"]
            pool += ["--decode", bad.url, "--decode", good.url]
            async with router(*pool, *(ONE_STRIKE if strict else ())) as url:
                check(await ask_all(url, bad), strict)

    run(test)


def test_the_proxy_before_two_routers_makes_a_spoiled_stream_good() -> None:
    """Of a stream the router sees a 200 only. The proxy asks the other group."""

    async def test() -> None:
        async with (
            FakeWorker("a") as a,
            FakeWorker("b") as b,
            router("--worker-urls", a.url) as one,
            router("--worker-urls", b.url) as other,
        ):
            said = {"text": "x", "stream": True}
            plan = {"fail": "anomaly", "after": 3}
            a.plan = plan
            async with proxying([one, other], hold_tokens=8) as proxy:
                answer = await ask(proxy.url, said)
                assert answer.status == 200 and b"kv_anomaly" not in answer.body
                assert answer.events[-1] == b"data: [DONE]"
            spoiled = await ask(one, said)  # control
            assert b"kv_anomaly" in spoiled.body

    run(test)
