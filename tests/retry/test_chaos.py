"""Workers that are killed and restarted under a hundred clients: nothing is lost, nothing twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from tests.retry.fake_worker import DONE, ENDS, EVENTS
from tests.retry.progress import moves, run
from tests.retry.serving import Answer, command, get
from tests.retry.test_requests import free_port

SEED = 20
CLIENTS, ASKED, DIRECT = 100, 10, 12
TOKENS, DELAY = 12, 0.05
PATHS = ("/generate", "/v1/chat/completions", "/v1/responses")


class Victim:
    """One worker process, and how often it was killed."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.kills = 0

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.retry.fake_worker", "--port", str(self.port)
        )

    async def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()
        self.kills += 1

    async def up(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await get(self.url + "/health")
                return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def proxy(victims: list[Victim]) -> AsyncIterator[str]:
    flags = ["--hold-tokens", "4", "--idle-timeout", "20"]
    for victim in victims:
        flags += ["--worker", victim.url]
    async with command(*flags) as running:
        yield running.url


async def torment(victims: list[Victim], chance: random.Random) -> None:
    """Kills in mid-stream and restarts, one worker at a time, sometimes two.

    Those that were restarted serve again before the next ones are killed: on a busy machine
    they need longer for that, and without it none would ever be up.
    """
    while True:
        await asyncio.sleep(chance.uniform(0.2, 0.7))
        chosen = chance.sample(victims, chance.choice((1, 1, 2)))
        for victim in chosen:
            await victim.kill()
        await asyncio.sleep(chance.uniform(0.0, 0.4))
        for victim in chosen:
            await victim.start()
        for victim in chosen:
            await victim.up()


def said(prompt: str, stream: bool) -> dict[str, Any]:
    return {
        "prompt": prompt, "stream": stream, "tokens": TOKENS, "mark": False,
        "delay": DELAY if stream else DELAY * TOKENS,
    }  # fmt: skip


def right(path: str, prompt: str) -> list[bytes]:
    """The events of the whole answer."""
    tokens = [f"{prompt}{i} " for i in range(TOKENS)]
    parts = [EVENTS[path]("".join(tokens[: i + 1]), token, i, {}) for i, token in enumerate(tokens)]
    return b"".join([*parts, ENDS[path]("".join(tokens), TOKENS, {})]).split(b"\n\n")[:-1]


def verdict(path: str, prompt: str, stream: bool, answer: Answer) -> str:
    """What became of it; anything that should not be begins with a `!`."""
    if not answer.complete:
        return "!cut off"
    if answer.status == 503:
        return "error" if json.loads(answer.body)["error"]["retryable"] is True else "!error"
    if answer.status != 200:
        return f"!{answer.status}"
    if stream:
        return stream_verdict(path, right(path, prompt), answer.body.split(b"\n\n")[:-1])
    text = "".join(f"{prompt}{i} " for i in range(TOKENS))
    return "right" if json.loads(answer.body)["text"] == text else "!wrong"


def stream_verdict(path: str, whole: list[bytes], events: list[bytes]) -> str:
    if events == whole:
        return "right"
    if path != "/v1/responses" and events.pop() != DONE.strip():
        return "!no end"
    told = json.loads(events.pop().partition(b"data: ")[2])
    if told.get("error", told).get("retryable") is not True:
        return "!no error"
    return "prefix" if events and events == whole[: len(events)] else "!wrong"


async def client(
    session: aiohttp.ClientSession, urls: list[str], name: str, seen: Counter[str]
) -> None:
    chance = random.Random(name)
    for number in range(ASKED):
        stream, path, prompt = chance.random() < 0.7, chance.choice(PATHS), f"{name}.{number}-"
        data, answer = json.dumps(said(prompt, stream)).encode(), Answer(0, [], b"")
        try:
            async with session.post(chance.choice(urls) + path, data=data) as response:
                answer.status = response.status
                while piece := await response.content.readany():
                    answer.body += piece
                    moves.note()
        except (aiohttp.ClientError, OSError):
            answer.complete = False
        seen[verdict(path, prompt, stream, answer)] += 1


def total(exposition: bytes) -> float:
    """Requests the proxy counted, whatever became of them."""
    name = b"sglang_scaling_fixes_retry_proxy_requests_total{"
    lines = [line for line in exposition.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(b" ")[2]) for line in lines)


def test_killed_workers_cost_no_answer_and_repeat_none() -> None:
    async def test() -> None:
        victims = [Victim() for _ in range(4)]
        seen: Counter[str] = Counter()
        direct: Counter[str] = Counter()
        for victim in victims:
            await victim.start()
        for victim in victims:
            await victim.up()
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with proxy(victims) as url, aiohttp.ClientSession(connector=connector) as session:
                torture = asyncio.create_task(torment(victims, random.Random(SEED)))
                clients = [client(session, [url], f"c{i}", seen) for i in range(CLIENTS)]
                urls = [victim.url for victim in victims]
                clients += [client(session, urls, f"d{i}", direct) for i in range(DIRECT)]
                await asyncio.gather(*clients)
                torture.cancel()
                await asyncio.gather(torture, return_exceptions=True)
                # A request is counted when its last byte has been sent, not before.
                while total(exposition := (await get(url + "/metrics")).body) < CLIENTS * ASKED:
                    await asyncio.sleep(0.05)
        finally:
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    await victim.kill()
        print(dict(seen), "direct:", dict(direct), "kills:", sum(v.kills for v in victims))
        assert not [what for what in seen if what.startswith("!")], seen
        assert sum(seen.values()) == CLIENTS * ASKED
        assert total(exposition) == CLIENTS * ASKED
        assert b'outcome="recovered"' in exposition
        # Control: without the proxy, the same requests to the same workers are cut off.
        assert direct["!cut off"] > 0

    run(test)
