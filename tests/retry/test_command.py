"""The command as operators run it: signals, its other port, its sockets, its limits."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from tests.retry.fake_worker import FakeWorker
from tests.retry.progress import run
from tests.retry.serving import Command, command, get, innocent_at, post


async def live(running: Command) -> None:
    while (await get(running.url + "/health")).status != 200:
        await asyncio.sleep(0.05)


def test_hup_reads_the_list_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        listed = tmp_path / "workers"
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            listed.write_text(f"worker {a.url}\n")
            async with command("--workers-file", str(listed), "--admin-port", "0") as running:
                assert running.admin is not None
                await live(running)
                assert (await post(running.url + "/generate", {})).status == 200
                # One that leaves the list ends what it runs, and is asked no more.
                plans = {"a": {"late": True}}
                said = {"stream": True, "tokens": 3, "plans": plans}
                leaving = asyncio.create_task(post(running.url + "/generate", said))
                while a.sent < 500:
                    await asyncio.sleep(0.01)
                for text in (f"worker {b.url}\n", "nonsense\n"):
                    listed.write_text(text)
                    running.process.send_signal(signal.SIGHUP)
                    names: list[str] = []
                    while names != [b.url]:
                        health = json.loads((await get(running.admin + "/health")).body)
                        names = [worker["worker"] for worker in health["workers"]]
                        await asyncio.sleep(0.02)
                    before = len(a.generations)
                    assert await innocent_at(running.url) == [200] * 4
                    assert len(a.generations) == before and b.generations
                a.may_end.set()
                assert (await leaving).events[-1] == b"data: [DONE]"

    run(test)


def test_term_says_so_and_serves_on_before_it_closes() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a:
            flags = ("--worker", a.url, "--admin-port", "0", "--drain-delay", "1.5")
            async with command(*flags) as running:
                await live(running)
                running.process.send_signal(signal.SIGTERM)
                while (health := await get(running.url + "/health")).status == 200:
                    await asyncio.sleep(0.01)
                assert health.status == 503 and json.loads(health.body)["draining"] is True
                assert await innocent_at(running.url) == [200] * 4
                assert await running.process.wait() == 0

    run(test)


def test_the_other_port_has_the_names_and_the_first_has_none() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a:
            async with command("--worker", a.url, "--admin-port", "0") as running:
                assert running.admin is not None
                await live(running)
                assert a.url.encode() in (await get(running.admin + "/health")).body
                assert a.url.encode() in (await get(running.admin + "/metrics")).body
                assert a.url.encode() not in (await get(running.url + "/health")).body
                assert (await get(running.url + "/metrics")).status == 501
                assert (await get(running.admin + "/v1/models")).status == 404
                assert not a.generations
            async with command("--worker", a.url) as running:  # control
                assert (await get(running.url + "/metrics")).status == 200 and not running.admin

    run(test)


def test_two_colons_are_both_families() -> None:
    async def test() -> None:
        async with FakeWorker("a") as a, command("--worker", a.url, "--host", "::") as running:
            port = running.url.rpartition(":")[2]
            for host in ("127.0.0.1", "[::1]"):
                assert (await get(f"http://{host}:{port}/health")).status in (200, 503)

    run(test)


def test_more_clients_than_open_files_hurt_no_worker() -> None:
    """Control: with the old number of requests in flight the command does not start."""

    async def test() -> None:
        async with FakeWorker("a") as a, FakeWorker("b") as b:
            flags = ("--worker", a.url, "--worker", b.url)
            async with command(*flags, "--admin-port", "0", files=170) as running:
                assert running.admin is not None
                await live(running)
                said = {"tokens": 2, "delay": 0.5}
                answers = await asyncio.gather(
                    *(post(running.url + "/generate", said) for _ in range(58))
                )
                statuses = {answer.status for answer in answers}
                assert statuses == {200, 503}
                refused = [answer for answer in answers if answer.status == 503]
                assert {answer.error["type"] for answer in refused} == {"overloaded"}
                health = json.loads((await get(running.admin + "/health")).body)
                assert [worker["state"] for worker in health["workers"]] == ["up", "up"]
                assert await innocent_at(running.url) == [200] * 4
            with pytest.raises(AssertionError, match="ulimit -n"):
                async with command(*flags, "--max-inflight", "1024", files=170):
                    pass

    run(test)
