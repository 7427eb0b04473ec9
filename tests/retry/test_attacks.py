"""What one user, one odd worker or one full machine does to everybody else: nothing.

Each attack has a control, in which it works.
"""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import aiohttp
import pytest

from sglang_scaling_fixes.retry import listener, worker_client
from sglang_scaling_fixes.retry.workers import WorkerState
from tests.retry.fake_worker import FakeWorker
from tests.retry.progress import eventually, run
from tests.retry.serving import everywhere, fleet, get, innocent, post, proxying

# Evidence


BAD_REQUESTS = [
    everywhere("close"),
    everywhere("half_body"),
    everywhere("not_http"),
    {**everywhere("close", after=2), "stream": True},
    {**everywhere("truncate", after=2), "stream": True},
]


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_request_that_breaks_takes_nobody_down(bad: dict[str, Any]) -> None:
    async def test() -> None:
        async with fleet("abc", refuse_seconds=0) as (proxy, _):
            for number in range(8):
                await post(proxy.url + "/generate", {**bad, "number": number})
                assert await innocent(proxy) == [200] * 4
                assert (await get(proxy.url + "/health")).status == 200
                assert not any(worker.down for worker in proxy.app.workers.all)

    run(test)


def test_control_a_worker_that_breaks_what_others_serve_is_taken_down() -> None:
    async def test() -> None:
        async with fleet("ab", probe_interval=3600) as (proxy, _):
            worker = proxy.app.workers.all[0]
            bad = {"tokens": 2, "plans": {"a": {"fail": "close"}}}
            for _ in range(40):
                assert (await post(proxy.url + "/generate", bad)).status == 200
                worker.avoided_until = 0.0  # asked again at once
                if worker.down:
                    break
            assert worker.down

    run(test)


def test_a_request_is_asked_of_no_third_worker_once_it_lost_two() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b, FakeWorker("c") as c:
            workers = (a, b, c)
            async with proxying(workers, refuse_seconds=3600) as proxy:
                bad = everywhere("close")
                for _ in range(4):  # as its client repeats it
                    answer = await post(proxy.url + "/generate", bad)
                    assert answer.status == 503 and answer.error["type"] == "worker_lost"
                    assert answer.header(b"x-should-retry") == b"false"
                    assert answer.header(b"retry-after") == b"3600"
                assert sum(len(worker.generations) for worker in workers) == 2
                assert await innocent(proxy) == [200] * 4
            async with proxying(workers, refuse_seconds=0) as proxy:  # control: nobody remembers
                await post(proxy.url + "/generate", bad)
                assert sum(len(w.generations) for w in workers) == 2 + 4 + 2

    run(test)


def test_a_worker_that_hangs_is_found_by_probes() -> None:
    async def test(probed: bool) -> None:
        times = {"probe_interval": 0.1, "probe_timeout": 0.3} if probed else {}
        async with fleet("ab", idle_timeout=3600, **times) as (proxy, (a, b)):
            a.frozen = True
            if probed:
                await eventually(lambda: proxy.app.workers.all[0].down)
            asked = [asyncio.create_task(innocent(proxy, 1)) for _ in range(10)]
            served = [b.sent > 0 and task.done() for task in asked]
            if probed:
                assert await asyncio.gather(*asked) == [[200]] * 10
            else:  # control: half of them hang
                await eventually(lambda: sum(task.done() for task in asked) >= 5)
                assert len(a.generations) == 5 and not all(served)
            a.frozen = False
            await asyncio.gather(*asked)

    run(lambda: test(True))
    run(lambda: test(False))


# The proxy's own limits


def test_a_machine_without_sockets_blames_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any, **__: Any) -> None:
        key: Any = aiohttp.client_reqrep.ConnectionKey("h", 1, False, True, None, None, None)
        raise aiohttp.ClientConnectorError(key, OSError(errno.EMFILE, "too many open files"))

    async def test(limits: frozenset[int], expected: tuple[str, WorkerState]) -> None:
        monkeypatch.setattr(worker_client, "_OWN_LIMITS", limits)
        async with fleet("a", probe_interval=3600) as (proxy, _):
            with monkeypatch.context() as patch:
                patch.setattr(aiohttp.TCPConnector, "connect", full)
                async with aiohttp.UnixConnector("unused") as unused:  # the client's own works
                    del unused
                reply = await _post_raw(proxy.port, "/generate", b'{"tokens": 2}')
            state = proxy.app.workers.all[0].state(asyncio.get_running_loop().time())
            assert (json.loads(reply)["error"]["type"], state) == expected

    ours = worker_client._OWN_LIMITS
    run(lambda: test(ours, ("overloaded", WorkerState.UP)))
    run(lambda: test(frozenset(), ("worker_lost", WorkerState.AVOIDED)))  # control


async def _post_raw(port: int, path: str, body: bytes) -> bytes:
    """The body of the answer, by no client library."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


def test_a_kept_connection_that_closes_is_no_failure() -> None:
    """A worker closes it just as the next request comes: after its time, or at a restart."""

    async def test(fresh: bool) -> None:
        async with fleet("a") as (proxy, (a,)):
            said = {"tokens": 2, "plans": {"a": {"fail": "reused"}}}
            for _ in range(6):
                if fresh:
                    assert (await post(proxy.url + "/generate", said)).status == 200
                else:
                    await post(a.url + "/generate", said)
            if fresh:
                counts = await proxy.scrape()
                assert counts['requests_total{outcome="ok"}'] == 6
                assert not [name for name in counts if name.startswith("retries_total")]
                assert proxy.app.workers.all[0].state(0.0) is WorkerState.UP
                assert len(a.generations) > 6  # some of them did break

    run(lambda: test(True))


def test_bodies_that_never_come_take_nobodys_place() -> None:
    async def test() -> None:
        async with fleet("a", max_inflight=4) as (proxy, (a,)):
            writers = []
            for _ in range(12):
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
                writers.append(writer)
            await asyncio.sleep(0.2)
            assert await innocent(proxy, 1) == [200]
            # Control: whole requests that are not answered do take the places.
            said = {"plans": {"a": {"fail": "hang"}}}
            hanging = [
                asyncio.create_task(post(proxy.url + "/generate", {**said, "x": i}))
                for i in range(4)
            ]
            await eventually(lambda: len(a.generations) == 5)
            assert await innocent(proxy, 1) == [503]
            for task in hanging:
                task.cancel()
            for writer in writers:
                writer.close()

    run(test)


@pytest.mark.parametrize("sent", [b"", b"POST /gen", b"GET /health HTTP/1.1\r\nHost: x\r\nA: b"])
def test_a_connection_without_a_request_is_closed(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(seconds: float, closed: bool) -> None:
        monkeypatch.setattr(listener, "HEADER_S", seconds)
        async with fleet("a") as (proxy, _):
            for first in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
                if first and not sent:
                    continue  # kept for the next request, as long as keep-alive says
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                writer.write(first)
                if first:
                    await reader.readuntil(b"}")
                writer.write(sent)
                ended = asyncio.create_task(reader.read())
                if closed:
                    await ended
                else:
                    await asyncio.sleep(0.6)
                    assert not ended.done()
                    ended.cancel()
                writer.close()

    run(lambda: test(0.3, True))
    run(lambda: test(3600.0, False))  # control


def test_headers_have_a_limit_whatever_is_installed() -> None:
    async def test() -> None:
        async with fleet("a") as (proxy, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            with pytest.raises(ConnectionError):
                for _ in range(400):
                    writer.write(b"X: " + b"x" * 1000 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
                assert b" 400 " in await reader.read()
                raise ConnectionResetError
            writer.close()
            small = {f"X-{i}": "x" * 1000 for i in range(50)}
            assert (await post(proxy.url + "/generate", {}, small)).status == 200

    run(test)


def test_what_stopped_readers_keep_is_counted_and_bounded() -> None:
    async def test() -> None:
        async with fleet("a", max_held_bytes=1_500_000) as (proxy, _):
            said = json.dumps({"stream": True, "tokens": 200, "size": 100_000}).encode()
            head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(said)
            writers = []
            for _ in range(12):
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(head + said)
                writers.append(writer)
            await eventually(lambda: proxy.app.budget.held > 500_000)
            counts: dict[str, float] = {}
            while counts.get('requests_total{outcome="broken"}', 0) < 1:
                counts = await proxy.scrape()
                assert counts["held_bytes"] <= 1_500_000
                await asyncio.sleep(0.05)
            assert await innocent(proxy) == [200] * 4
            for writer in writers:
                writer.close()
            await eventually(lambda: proxy.app.budget.held == 0)

    run(test)
