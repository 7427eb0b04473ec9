"""One request to a prefill and the decode server, as a router sends it.

Both get it at once. Decode's answer is the answer: what prefill says of its half is not looked
at, only that it can be reached. After decode's answer, or when the time is up, what is still
open is hung up, as a router does whose client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from benchmarks.reclaim.load import End, Ends

MOST_RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class Answer:
    """Of decode. Status 0: none, and `body` says why."""

    status: int
    body: Any
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class Abort:
    """POST /abort_request to one of the two servers, so long after the sending."""

    at: Literal["prefill", "decode"]
    after_s: float


class Router:
    """`limit_s`: how long a request may take."""

    def __init__(self, session: aiohttp.ClientSession, limit_s: float) -> None:
        self._session = session
        self._limit_s = limit_s

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, limit_s: float) -> AsyncIterator[Router]:
        """A connection per request: what is hung up ends no other."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        ) as session:
            yield cls(session, limit_s)

    async def ask(self, ends: Ends, payload: dict[str, Any], abort: Abort | None = None) -> Answer:
        """Never raises for a server's sake."""
        data = json.dumps(payload).encode()
        prefill = asyncio.create_task(self._post(ends.prefill, "/generate", data))
        decode = asyncio.create_task(self._post(ends.decode, "/generate", data))
        tasks: list[asyncio.Task[Any]] = [prefill, decode]
        if abort is not None:
            tasks.append(asyncio.create_task(self._abort(ends, payload["rid"], abort)))
        try:
            async with asyncio.timeout(self._limit_s):
                await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
                if not decode.done():
                    prefill.result()  # raises where prefill cannot be reached
                return await decode
        except TimeoutError:
            return Answer(0, f"no answer within {self._limit_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Answer(0, f"{type(error).__name__}: {error}")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _abort(self, ends: Ends, rid: str, abort: Abort) -> None:
        await asyncio.sleep(abort.after_s)
        server = ends.prefill if abort.at == "prefill" else ends.decode
        await self._post(server, "/abort_request", json.dumps({"rid": rid}).encode())

    async def _post(self, server: End, path: str, data: bytes) -> Answer:
        url = f"http://{server.address}:{server.port}{path}"
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url, data=data, headers=headers) as response:
            text = await response.read()
            return Answer(response.status, _decoded(text), _seconds(response))


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode(errors="replace")


def _seconds(response: aiohttp.ClientResponse) -> float:
    """What Retry-After asks for, within reason; 0 without it."""
    word = response.headers.get("Retry-After", "")
    return min(float(word), MOST_RETRY_AFTER_S) if word.isdecimal() else 0.0
