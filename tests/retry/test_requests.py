"""Whole answers, limits, clients that leave or are slow, workers that are gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.retry.fake_worker import ANOMALY, FakeWorker
from tests.retry.progress import eventually, run, stands_still
from tests.retry.serving import get, post, proxying


def ask(**plan: Any) -> dict[str, Any]:
    return {"tokens": 4, "plans": {"a": plan} if plan else {}}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


BAD_ANSWERS: list[tuple[str, dict[str, Any]]] = [
    ("anomaly", {"fail": "anomaly"}),
    ("anomaly", {"fail": "anomaly", "chunked": True}),
    ("anomaly", {"fail": "status", "body": {"error": {"type": "kv_anomaly", "message": ANOMALY}}}),
    (
        "anomaly",
        {"fail": "status", "body": {"object": "error", "type": "503", "message": ANOMALY}},
    ),
    ("anomaly", {"fail": "status", "status": 500, "body": {"detail": ANOMALY}}),
    ("unavailable", {"fail": "status"}),
    ("unavailable", {"fail": "status", "status": 502, "body": "<html>"}),
    ("unavailable", {"fail": "status", "status": 504, "body": ""}),
    ("lost", {"fail": "close"}),
    ("lost", {"fail": "half_body"}),
    ("lost", {"fail": "half_body", "chunked": True}),
    ("unreadable", {"fail": "not_http"}),
]


@pytest.mark.parametrize(("reason", "plan"), BAD_ANSWERS)
def test_a_bad_answer_is_asked_of_another(reason: str, plan: dict[str, Any]) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b]) as proxy:
                answer = await post(proxy.url + "/generate", ask(**plan))
                counts = await proxy.scrape()
            good = await post(b.url + "/generate", ask(**plan))
            assert answer == good and len(a.generations) == 1
            assert counts[f'retries_total{{outcome="retried",reason="{reason}"}}'] == 1
            # Control: no second attempt, no answer.
            async with proxying([a, b], attempts=1) as proxy:
                answer = await post(proxy.url + "/generate", ask(**plan))
                assert answer.status == 503 and answer.error["retryable"] is True

    run(test)


def test_one_aborted_prompt_of_a_list_fails_the_list() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, proxying([a, b]) as proxy:
            said = {**ask(fail="anomaly"), "text": ["x", "y"]}
            answer = await post(proxy.url + "/generate", said)
            assert b"b:0" in answer.body and b"abort" not in answer.body

    run(test)


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 501])
def test_a_refusal_is_the_clients(status: int) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, proxying([a, b]) as proxy:
            said = ask(fail="status", status=status, body={"error": {"message": "kv_anomalies"}})
            assert await post(proxy.url + "/generate", said) == await post(
                a.url + "/generate", said
            )
            assert not b.generations

    run(test)


def test_what_is_sent_on_is_what_was_sent() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, proxying([a]) as proxy:
            body = b'{"text":  "\xc3\xa9", "sampling_params": {"seed": 7, "x": 1e400}}  '
            headers = {
                "Authorization": "Bearer secret",
                "X-Request-Id": "r-1",
                "Accept-Encoding": "gzip",
                "X-Hop": "1",
                "Connection": "x-hop",
            }
            await post(proxy.url + "/generate?a=%2F&b=c+d", body, headers)
            seen = a.generations[0]
            assert seen.target == "/generate?a=%2F&b=c+d" and seen.body == body
            sent = {name.lower(): value for name, value in seen.headers}
            assert sent.pop("user-agent").startswith("Python")  # the client's own
            assert sent == {
                "host": a.url.removeprefix("http://"),
                "authorization": "Bearer secret",
                "x-request-id": "r-1",
                "accept": "*/*",
                "accept-encoding": "identity",
                "content-type": "application/octet-stream",
                "content-length": str(len(body)),
            }

    run(test)


def test_an_answer_too_large_to_hold_is_passed_on_and_then_cut_off() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            async with proxying([a, b], hold_bytes=2048) as proxy:
                said = {**ask(), "tokens": 2000}
                through = await post(proxy.url + "/generate", said)
                assert through == await post(a.url + "/generate", said)
                said = {**said, "plans": {n: {"fail": "half_body"} for n in "ab"}}
                answer = await post(proxy.url + "/generate", said)
                assert not answer.complete and answer.status == 200
            # Control: held, it is made good or refused, never cut off.
            async with proxying([a, b]) as proxy:
                answer = await post(proxy.url + "/generate", said)
                assert answer.complete and answer.status == 503

    run(test)


def test_reading_goes_to_one_worker_and_changing_to_none() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, proxying([a, b]) as proxy:
            assert (await get(proxy.url + "/v1/models")).body == b'{"worker": "a"}'
            assert (await get(proxy.url + "/get_model_info")).body == b'{"worker": "b"}'
            for path in (
                "/flush_cache",
                "/abort_request",
                "/update_weights_from_disk",
                "/api/chat",
            ):
                answer = await post(proxy.url + path, {})
                assert answer.status == 501 and answer.error["retryable"] is False
                assert path in answer.error["message"]
            for path in ("/flush_cache", "/clear_hicache_storage_backend", "/server_info"):
                assert (await get(proxy.url + path)).status == 501
            for path in ("//generate", "/x/../generate", "/generate/", "/generate;a"):
                assert (await post(proxy.url + path, {})).status == 501
            assert len(a.generations) + len(b.generations) == 2

    run(test)


def test_reading_is_retried_too() -> None:
    async def test() -> None:
        gone = FakeWorker("gone")
        async with FakeWorker("a") as a, gone, proxying([gone, a], probe_interval=3600) as proxy:
            await eventually(lambda: all(w.answered for w in proxy.app.workers.all))
            await gone.__aexit__()
            for _ in range(2):
                assert (await get(proxy.url + "/v1/models")).body == b'{"worker": "a"}'
            assert b'reason="refused"' in (await get(proxy.url + "/metrics")).body

    run(test)


def test_a_target_that_is_no_path_goes_nowhere() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, proxying([a]) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"GET http://elsewhere/x HTTP/1.1\r\nHost: elsewhere\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
            writer.close()
            assert not a.generations

    run(test)


def test_limits() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a:
            async with proxying([a], max_inflight=1, max_body_bytes=1000) as proxy:
                url = proxy.url + "/generate"
                first = asyncio.create_task(post(url, ask(fail="hang")))
                await eventually(lambda: bool(a.generations))
                refused = await post(url, ask())
                assert refused.status == 503 and refused.error["type"] == "overloaded"
                assert refused.header(b"retry-after") == b"1"
                assert (await get(proxy.url + "/health")).status == 200
                first.cancel()
                await eventually(a.generations[0].hung_up.is_set)
                assert (await post(url, ask())).status == 200
                assert (await post(url, b" " * 998 + b"{}")).status == 200
                assert (await post(url, b" " * 999 + b"{")).status == 400
                large = await post(url, b"x" * 1001)
                assert large.status == 413 and large.error["type"] == "request_too_large"
                counts = await proxy.scrape()
                assert counts['requests_total{outcome="refused"}'] == 3
            async with proxying([a], max_held_bytes=2000) as proxy:
                refused = await post(proxy.url + "/generate", b"x" * 2001)
                assert refused.status == 503 and refused.error["type"] == "overloaded"
                assert proxy.app.budget.held == 0

    run(test)


@pytest.mark.parametrize("kind", ["first byte", "held", "flowing"])
def test_a_client_that_leaves_frees_the_worker(kind: str) -> None:
    async def test() -> None:
        hold = 100 if kind == "held" else 0
        async with FakeWorker("a") as a, proxying([a], hold_tokens=hold) as proxy:
            said = {
                "stream": kind != "first byte",
                "plans": {"a": {"fail": "hang", "after": 0 if kind == "first byte" else 3}},
            }
            client = asyncio.create_task(post(proxy.url + "/generate", said))
            await eventually(lambda: bool(a.generations))
            await asyncio.sleep(0.2)
            # Control: it does not end by itself.
            assert not client.done() and not a.generations[0].hung_up.is_set()
            client.cancel()
            await eventually(a.generations[0].hung_up.is_set)
            await eventually(lambda: proxy.app.workers.all[0].in_flight == 0)
            counts = await proxy.scrape()
            assert counts['requests_total{outcome="disconnected"}'] == 1
            assert counts["inflight"] == 0 and counts["held_bytes"] == 0
            assert counts['worker_up{worker="' + a.url + '"}'] == 1

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_slow_client_slows_the_worker(stream: bool) -> None:
    """What the worker could send is what the buffers of four sockets take, not the answer."""
    total = 64 << 20

    async def test() -> None:
        said: dict[str, Any] = {"stream": stream, "size": 100_000, "tokens": total // 100_000}
        if not stream:
            said = {"tokens": 1, "prompt": "x" * total}
        body = json.dumps(said).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        options: dict[str, Any] = {"hold_bytes": 1 << 20, "max_body_bytes": 1 << 30}
        async with FakeWorker("a") as a, proxying([a], **options) as proxy:
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(slow, ("127.0.0.1", proxy.port))
            await loop.sock_sendall(slow, head.encode() + body)
            await eventually(lambda: bool(a.generations))
            await stands_still(lambda: a.sent, lambda: bool(a.blocked), total)
            assert 0 < a.sent < total / 2
            assert proxy.app.budget.held < 2 * len(body) + (2 << 20)
            slow.close()
            await eventually(a.generations[0].hung_up.is_set)
            # Control: a client that reads gets all of it.
            quick = await post(proxy.url + "/generate", body)
            assert quick.complete and len(quick.body) >= total - 100_000

    run(test)


def test_workers_that_are_gone_are_said_at_once() -> None:
    async def test() -> None:
        ports = [free_port() for _ in range(3)]
        async with proxying([f"http://127.0.0.1:{port}" for port in ports]) as proxy:
            for _ in range(2):
                answer = await post(proxy.url + "/generate", ask())
                assert answer.status == 503 and answer.error["type"] == "worker_lost"
                assert str(ports[0]) not in answer.body.decode()
                assert answer.error["retryable"] is True and answer.header(b"retry-after") == b"1"
            await eventually(lambda: all(w.down for w in proxy.app.workers.all))
            health = await get(proxy.url + "/health")
            assert health.status == 503 and str(ports[0]) not in health.body.decode()

    run(test)


def test_no_worker_is_live_before_one_has_answered() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a:
            a.healthy = False
            async with proxying([a]) as proxy:
                await eventually(lambda: len(a.seen) >= 1)
                assert (await get(proxy.url + "/health")).status == 503
                # It is the only one. To ask it is better than to ask nobody.
                assert (await post(proxy.url + "/generate", ask())).status == 200
                a.healthy = True
                await eventually(lambda: not proxy.app.workers.all[0].down)
                assert (await get(proxy.url + "/health")).status == 200

    run(test)


def test_a_silent_worker_is_given_up() -> None:
    async def test() -> None:
        async with (
            FakeWorker("a") as a,
            FakeWorker("b") as b,
            proxying([a, b], idle_timeout=1.5) as proxy,
        ):
            answer = await post(proxy.url + "/generate", ask(fail="hang"))
            assert answer.status == 200 and b"b:0" in answer.body
            await eventually(a.generations[0].hung_up.is_set)
            said = {**ask(fail="hang", after=2), "stream": True}
            said["plans"]["b"] = said["plans"]["a"]
            answer = await post(proxy.url + "/generate", said)
            assert b'"type": "worker_timeout"' in answer.body

    run(test)


def test_workers_that_refuse_are_left_alone_as_long_as_they_say() -> None:
    async def test() -> None:
        async with (
            FakeWorker("a") as a,
            FakeWorker("b") as b,
            proxying([a, b], avoid_seconds=7200) as proxy,
        ):
            said = ask(fail="status", retry_after=3600)
            for _ in range(6):
                assert (await post(proxy.url + "/generate", said)).status == 200
            assert len(a.generations) == 1
            said["plans"]["b"] = said["plans"]["a"]
            answer = await post(proxy.url + "/generate", said)
            assert answer.status == 503 and answer.header(b"retry-after") == b"3600"
            assert len(a.generations) == 2  # avoided, but there was nobody else

    run(test)


def test_one_line_is_logged_for_each_failed_attempt(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, proxying([a, b]) as proxy:
            await post(proxy.url + "/generate", {**ask(fail="anomaly"), "rid": "r-7"})
            line = json.loads(caplog.messages[-1])
            assert line == {
                "event": "attempt_failed",
                "outcome": "retried",
                "request": "r-7",
                "worker": a.url,
                "reason": "anomaly",
                "attempt": 1,
                "sent_bytes": 0,
                "message": ANOMALY,
            }

    run(test)


def test_a_client_that_stops_reading_is_given_up() -> None:
    async def test() -> None:
        body = json.dumps({"stream": True, "size": 100_000, "tokens": 1000}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        async with FakeWorker("a") as a, proxying([a], idle_timeout=1.0) as proxy:
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
            writer.write(head.encode() + body)
            await eventually(lambda: bool(a.generations))
            await eventually(a.generations[0].hung_up.is_set)
            await eventually(lambda: proxy.app.workers.all[0].in_flight == 0)
            writer.close()

    run(test)


@contextlib.contextmanager
def command(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its URL."""
    words = ["-m", "sglang_scaling_fixes.cli", "retry-proxy", "--port", "0", *flags]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield process, process.stderr.readline().split()[1].rstrip(",")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("grace", "ends_well"), [("30", True), ("1", False)])
def test_sigterm_lets_streams_end_and_the_status_is_0(grace: str, ends_well: bool) -> None:
    async def test() -> None:
        async with FakeWorker("a") as a:
            with command("--worker", a.url, "--grace", grace) as (process, url):
                said = {"stream": True, "tokens": 25, "delay": 0.1}
                client = asyncio.create_task(post(url + "/generate", said))
                await eventually(lambda: a.sent > 400)
                process.terminate()
                answer = await client
                assert answer.complete and answer.events[-1] == b"data: [DONE]"
                told = json.loads(answer.events[-2].removeprefix(b"data: "))
                assert ("error" in told) is not ends_well
                assert await asyncio.to_thread(process.wait) == 0
                with pytest.raises(aiohttp.ClientError):
                    await post(url + "/generate", said)

    run(test)
