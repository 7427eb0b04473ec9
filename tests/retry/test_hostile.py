"""Clients and workers that mean harm, or are odd: nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sglang_scaling_fixes.retry import relay
from sglang_scaling_fixes.retry.discovery import Discovery
from sglang_scaling_fixes.retry.settings import all_servers
from sglang_scaling_fixes.retry.workers import Workers
from tests.retry.fake_worker import FakeWorker, chunk
from tests.retry.progress import eventually, run
from tests.retry.serving import everywhere, fleet, innocent, post, proxying
from tests.retry.test_fleets import secret_file

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize("kind", ["false alarm", "500"])
def test_nobody_steers_the_fleet_onto_one_worker(kind: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with fleet("abc", secret_file=secret_file(tmp_path)) as (proxy, workers):
            bad = everywhere("anomaly", rule="high", listens=True)
            if kind == "500":
                bad = everywhere("status", status=500)
            await post(proxy.url + "/generate", bad)
            before = [len(worker.generations) for worker in workers]
            said = [{"prompt": str(i), "delay": 0.2} for i in range(60)]
            await asyncio.gather(*(post(proxy.url + "/generate", one) for one in said))
            counts = [len(w.generations) - n for w, n in zip(workers, before, strict=True)]
            assert min(counts) >= 10, counts

    run(test)


def test_a_body_that_stops_on_its_way_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of it has come at once: what it had does not buy it time."""
    monkeypatch.setattr("sglang_scaling_fixes.retry.intake.BODY_S", 0.5)

    async def test() -> None:
        async with fleet("a", max_body_bytes=1 << 20, max_held_bytes=4 << 20) as (proxy, _):
            writers = []
            for _ in range(4):
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                writer.write(
                    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
                )
                writer.write(b" " * 1048575)
                writers.append(writer)
            await eventually(lambda: proxy.app.budget.held > 4_000_000)
            assert (await post(proxy.url + "/generate", {"text": "x" * 2000})).status == 503
            await eventually(lambda: proxy.app.budget.held == 0)
            assert await innocent(proxy) == [200] * 4
            for writer in writers:
                writer.close()

    run(test)


def test_no_routing_field_goes_through_where_it_cannot_be_taken_back() -> None:
    async def test() -> None:
        async with fleet("a") as (proxy, (a,)):
            encoded = {"Content-Encoding": "x"}
            for body in (b'{"x":NaN,"bootstrap_host":"evil"}', b'{"bootstrap_host":"evil"}'):
                assert (await post(proxy.url + "/generate", body, encoded)).status == 415
            inner = {"instances": [{"text": "x"}], "parameters": {"data_parallel_rank": 3}}
            answer = await post(proxy.url + "/vertex_generate", inner)
            assert answer.status == 400 and "data_parallel_rank" in answer.error["message"]
            inner["parameters"] = {"sampling_params": {}}
            assert (await post(proxy.url + "/vertex_generate", inner)).status == 200
            assert len(a.generations) == 1

    run(test)


@pytest.mark.parametrize("resumes", [False, None])
@pytest.mark.parametrize("after", [11, 19])
def test_asking_to_go_on_never_makes_a_retry_worse(resumes: bool | None, after: int) -> None:
    """The client has nothing yet; the next worker cannot resume, and begins anew."""

    async def test() -> None:
        async with fleet("ab", migrations=1, hold_tokens=25) as (proxy, (_, b)):
            b.resumes = resumes
            plans = {"a": {"fail": "close", "after": after, "garbage": 0}}
            said = {"stream": True, "tokens": 20, "mark": False, "plans": plans}
            answer = await post(proxy.url + "/generate", said)
            assert answer.status == 200 and answer.events[-1] == b"data: [DONE]"
            assert answer.body.count(b'"text": "0 "') == 1

    run(test)


def test_a_stopped_reader_leaves_no_socket_behind() -> None:
    async def test() -> None:
        async with fleet("a", idle_timeout=1) as (proxy, _):
            before = len(os.listdir("/proc/self/fd"))
            said = json.dumps({"stream": True, "tokens": 200, "size": 100_000}).encode()
            writers = []
            for _ in range(8):
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(HEAD % len(said) + said)
                writers.append(writer)
            await eventually(lambda: len(os.listdir("/proc/self/fd")) >= before + 16)
            # Of each only the client's own end stays.
            await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + len(writers) + 2)
            for writer in writers:
                writer.close()

    run(test)


def test_a_client_that_leaves_is_noticed_behind_its_next_request() -> None:
    async def test() -> None:
        async with fleet("a") as (proxy, (a,)):
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            said = b'{"delay": 3600}'
            writer.write(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(said)
            )
            writer.write(said)
            await eventually(lambda: bool(a.generations))
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.2)
            writer.transport.abort()
            await eventually(a.generations[0].hung_up.is_set)

    run(test)


@pytest.mark.parametrize("rid", ["a\nb", " x", "x\0", "\t", "é", "x" * 300])
def test_a_name_that_is_no_header_is_not_made_one(rid: str) -> None:
    async def test() -> None:
        async with fleet("a") as (proxy, (a,)):
            answer = await post(proxy.url + "/generate", {"tokens": 1, "rid": rid})
            assert answer.status == 200 and answer.name and answer.name != rid
            assert a.generations[0].said["rid"] == rid

    run(test)


def test_a_list_with_a_name_that_nobody_knows_changes_nothing() -> None:
    async def test() -> None:
        workers = Workers(all_servers({"worker": ["http://127.0.0.1:1"]}, ""))
        for name in ("dns+http://no-such.invalid:1", "dns+http://a..b:1"):
            listed = all_servers({"worker": [name]}, "")
            await Discovery(workers, [], partial(list, listed)).reload()
            assert [worker.name for worker in workers.all] == ["http://127.0.0.1:1"]
        good = all_servers({"worker": ["dns+http://localhost:1"]}, "")
        await Discovery(workers, [], lambda: good).reload()
        assert workers.all and "127.0.0.1:1" not in [workers.all[0].server.url]

    run(test)


class Odd(FakeWorker):
    """Sends these pieces as its answer."""

    pieces: tuple[bytes, ...] = ()
    forever = b""

    async def _answer(self, one: Any, writer: asyncio.StreamWriter) -> bool:
        if one.method != "POST":
            return await super()._answer(one, writer)
        for piece in self.pieces:
            writer.write(piece)
            await writer.drain()
        while self.forever:
            writer.write(self.forever)
            await writer.drain()
            await asyncio.sleep(0.05)
        return False


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-SGLang-Scaling-Fixes-Resumed: 0\r\n\r\n"
)
ODD_EVENTS = [
    b'data: {"error": {"code": ' + b"9" * 5000 + b"}}\n\n",
    b'data: {"error": {"type": ["x"], "code": 500}}\n\n',
    b": sglang_scaling_fixes_resume_ids [,]\n\n",
    b'data: {"sequence_number": null}\n\n: sglang_scaling_fixes_resume_ids [1000]\n\n',
    b'data: {"response": {"output": 5}}\n\n: sglang_scaling_fixes_resume_ids [1000]\n\n',
]


@pytest.mark.parametrize("event", ODD_EVENTS)
def test_an_odd_answer_is_a_failed_attempt(event: bytes) -> None:
    async def test() -> None:
        async with Odd("a") as a, FakeWorker("b") as b, proxying([a, b], migrations=1) as proxy:
            a.pieces = (STREAM, chunk(event))
            said = {"stream": True, "tokens": 3, "mark": False}
            answers = [await post(proxy.url + "/generate", said) for _ in range(2)]
            assert {answer.status for answer in answers} == {200}
            assert all(answer.events[-1] == b"data: [DONE]" for answer in answers)
            assert a.generations

    run(test)


def test_comments_after_the_end_do_not_keep_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "AFTER_END_S", 0.5)

    async def test() -> None:
        async with Odd("a") as a, proxying([a]) as proxy:
            a.pieces = (STREAM, chunk(b'data: {"text": "x"}\n\ndata: [DONE]\n\n'))
            a.forever = chunk(b": still here\n\n")
            answer = await post(proxy.url + "/generate", {"stream": True})
            assert answer.complete and b"[DONE]" in answer.body

    run(test)


def test_garbage_that_comes_in_one_block_with_its_verdict_is_not_given_out() -> None:
    async def test() -> None:
        async with (
            Odd("a") as a,
            FakeWorker("b") as b,
            proxying([a, b], hold_tokens=8, migrations=1) as proxy,
        ):
            tokens = [b'data: {"text": "GARBAGE", "meta_info": {}}\n\n'] * 12
            ids = b": sglang_scaling_fixes_resume_ids [%s]\n\n" % b",".join([b"1"] * 12)
            said = "kv_anomaly: x [rule=r suspicion=s suspect_from=4]"
            verdict = {"error": {"type": "kv_anomaly", "code": 503, "message": said}}
            end = b"data: " + json.dumps(verdict).encode() + b"\n\n"
            a.pieces = (STREAM, chunk(b"".join(tokens) + ids + end))
            for _ in range(2):
                answer = await post(proxy.url + "/generate", {"stream": True, "tokens": 9})
                assert b"GARBAGE" not in answer.body and b"b:0" in answer.body
            assert a.generations

    run(test)


def test_a_length_is_not_that_of_a_stream_without_its_comments() -> None:
    async def test() -> None:
        async with Odd("a") as a, proxying([a], migrations=1) as proxy:
            body = (
                b'data: {"text": "x"}\n\n: sglang_scaling_fixes_resume_ids [1]\n\ndata: [DONE]\n\n'
            )
            head = STREAM.replace(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(body))
            a.pieces = (head + body,)
            answer = await post(proxy.url + "/generate", {"stream": True})
            assert answer.complete and answer.events == [b'data: {"text": "x"}', b"data: [DONE]"]

    run(test)


def test_who_resumes_a_stream_himself_gets_what_the_worker_says() -> None:
    async def test() -> None:
        async with fleet("a", migrations=1) as (proxy, (a,)):
            field = {"output_ids": [1000, 1001], "report_ids": True}
            said = {"stream": True, "tokens": 5, "sglang_scaling_fixes_resume": field}
            answer = await post(proxy.url + "/generate", said)
            assert a.generations[0].said["sglang_scaling_fixes_resume"] == field
            assert b": sglang_scaling_fixes_resume_ids [" in answer.body

    run(test)


def test_a_false_alarm_in_a_stream_goes_on_with_a_single_migration(tmp_path: Path) -> None:
    async def test() -> None:
        options = {"secret_file": secret_file(tmp_path), "migrations": 1, "trail_tokens": 6}
        async with fleet("ab", **options) as (proxy, _):
            plan = {"fail": "anomaly", "garbage": 0, "rule": "high", "listens": True}
            plans = {name: {**plan, "after": 14, "suspect_from": 11} for name in "ab"}
            said = {"stream": True, "tokens": 20, "mark": False, "plans": plans}
            answer = await post(proxy.url + "/generate", said)
            assert answer.events[-1] == b"data: [DONE]" and b"kv_anomaly" not in answer.body
            assert b"19 " in answer.body

    run(test)


def test_a_cancel_beside_a_time_out_is_not_lost() -> None:
    async def test() -> None:
        async with fleet("ab", token_timeout=0.3, first_token_timeout=0.3) as (proxy, (a, b)):
            said = {"stream": True, "plans": {n: {"fail": "comments"} for n in "ab"}}
            for _ in range(5):
                client = asyncio.create_task(post(proxy.url + "/generate", said))
                await asyncio.sleep(0.3)
                client.cancel()
                with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
                    await client
            await eventually(
                lambda: all(one.hung_up.is_set() for one in a.generations + b.generations)
            )
            assert proxy.app.budget.held == 0

    run(test)
