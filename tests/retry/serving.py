"""The real proxy in this event loop, and a client that says exactly what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn
from yarl import URL

from sglang_scaling_fixes.retry.listener import client_protocol
from sglang_scaling_fixes.retry.proxy import RetryProxy
from sglang_scaling_fixes.retry.settings import checked_settings
from tests.retry.fake_worker import FakeWorker
from tests.retry.progress import moves

NAMES = ("a", "b", "c")
"""Of the workers in most tests."""
PATHS = (
    "/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)


@dataclass
class Answer:
    """`complete`: the body ended as HTTP says it does. `name`: the request's, if it has one."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    complete: bool = True
    name: str | None = field(default=None, compare=False)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]

    @property
    def events(self) -> list[bytes]:
        return [part for part in self.body.split(b"\n\n") if part]

    def header(self, name: bytes) -> bytes | None:
        return {k.lower(): v for k, v in self.headers}.get(name)


@dataclass
class Proxy:
    url: str
    port: int
    app: RetryProxy

    async def scrape(self) -> dict[str, float]:
        lines = (await get(self.url + "/metrics")).body.decode().splitlines()
        found = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
        prefix = "sglang_scaling_fixes_retry_proxy_"
        return {name.removeprefix(prefix): float(value) for name, _, value in found}


@contextlib.asynccontextmanager
async def proxying(
    workers: Sequence[FakeWorker | str] = (),
    pairs: Sequence[str] = (),
    *,
    prefills: Sequence[FakeWorker] = (),
    decodes: Sequence[FakeWorker] = (),
    **options: Any,
) -> AsyncIterator[Proxy]:
    given = {
        "worker": [worker if isinstance(worker, str) else worker.url for worker in workers],
        "pd": pairs,
        "prefill": [prefill.url for prefill in prefills],
        "decode": [decode.url for decode in decodes],
    }
    settings = checked_settings(given, **options)
    app = RetryProxy(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=client_protocol(settings.idle_timeout), lifespan="on", ws="none",
        log_config=None, access_log=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    port = listener.getsockname()[1]
    while any(not worker.answered and not worker.down for worker in app.workers.all):
        await asyncio.sleep(0.01)  # the first probes decide who is asked first
    try:
        yield Proxy(f"http://127.0.0.1:{port}", port, app)
    finally:
        server.should_exit = True
        await task


@dataclass
class Command:
    """The command in a process of its own. `admin`: its other port's URL, if it has one."""

    process: asyncio.subprocess.Process
    url: str
    admin: str | None


@contextlib.asynccontextmanager
async def command(*flags: str, files: int | None = None) -> AsyncIterator[Command]:
    """`files`: its limit of open files. At the end it is stopped, and its exit status is 0."""
    line = [sys.executable, "-m", "sglang_scaling_fixes.cli", "retry-proxy", "--port", "0", *flags]
    if files is not None:
        line = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *line]
    process = await asyncio.create_subprocess_exec(*line, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    said = (await process.stderr.readline()).decode()
    rest = asyncio.create_task(process.stderr.read())
    try:
        first, *others = re.findall(r"http://\S+?(?=[,\s])", said)
        yield Command(process, first, others[0] if others else None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        assert await process.wait() == 0, said + (await rest).decode()
        await rest


@contextlib.asynccontextmanager
async def front(*command: str, port: int, ready: str) -> AsyncIterator[str]:
    """A module of this Python that serves at `port`, once `ready` answers 200; its URL.

    It writes what it does to nowhere, and ends with the block, its children too.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", *command, "--host", "127.0.0.1", "--port", str(port)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not await _answers(url + ready):
            await asyncio.sleep(0.1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _answers(url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        return (await get(url)).status == 200
    return False


@contextlib.asynccontextmanager
async def fleet(names: str, **options: Any) -> AsyncIterator[tuple[Proxy, list[FakeWorker]]]:
    """The proxy before workers that are called by the letters of `names`."""
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(FakeWorker(name)) for name in names]
        yield await stack.enter_async_context(proxying(workers, **options)), workers


async def post(
    url: str, said: dict[str, Any] | bytes, headers: dict[str, str] | None = None
) -> Answer:
    data = said if isinstance(said, bytes) else json.dumps(said).encode()
    return await _ask("POST", url, data, headers)


async def get(url: str) -> Answer:
    return await _ask("GET", url, None, None)


async def _ask(method: str, url: str, data: bytes | None, headers: dict[str, str] | None) -> Answer:
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.request(method, URL(url, encoded=True), data=data, headers=headers) as response,
    ):
        name = response.headers.get("X-Request-Id")
        raw = [h for h in response.raw_headers if h[0].lower() != b"x-request-id"]
        answer = Answer(response.status, raw, b"", name=name)
        pieces: list[bytes] = []
        try:
            while piece := await response.content.readany():
                pieces.append(piece)
                if method != "GET":  # a poll for something that never happens is no progress
                    moves.note()
        except aiohttp.ClientError:
            answer.complete = False
        answer.body = b"".join(pieces)
        return answer


def everywhere(fail: str, **plan: Any) -> dict[str, Any]:
    return {"tokens": 4, "plans": {name: {"fail": fail, **plan} for name in NAMES}}


async def innocent(proxy: Proxy, count: int = 4) -> list[int]:
    return await innocent_at(proxy.url, count)


async def innocent_at(url: str, count: int = 4) -> list[int]:
    """The statuses of requests that do nothing to anybody, sent at once."""
    answers = [post(url + "/generate", {"tokens": 2}) for _ in range(count)]
    return [answer.status for answer in await asyncio.gather(*answers)]
