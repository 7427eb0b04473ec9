"""The real proxy in this event loop, and a client that says exactly what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn
from yarl import URL

from sglang_scaling_fixes.retry.listener import ClientProtocol
from sglang_scaling_fixes.retry.proxy import RetryProxy
from sglang_scaling_fixes.retry.settings import checked_settings
from tests.retry.fake_worker import FakeWorker
from tests.retry.progress import moves

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
    app = RetryProxy(checked_settings(given, **options))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=ClientProtocol, lifespan="on", ws="none", log_config=None, access_log=False,
        server_header=False, date_header=False, timeout_graceful_shutdown=1,
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
