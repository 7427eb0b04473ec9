"""Tells workers that a request they ended was sound, so that they cache its prompt again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from sglang_scaling_fixes.retry.telemetry import log
from sglang_scaling_fixes.vouch import FALSE_ALARM_PATH, HEADER

TIMEOUT_S = 10.0
MOST = 64
"""Under way at once. What is not told costs a cached prompt, and no correct answer."""


class Withdrawals:
    """Sends them beside the requests, each once: nobody waits for them."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._under_way: set[asyncio.Task[None]] = set()

    def send(self, words: Sequence[tuple[str, str]]) -> None:
        """`words`: the server's URL, and the signed word."""
        for url, word in words[: MOST - len(self._under_way)]:
            task = asyncio.create_task(self._tell(url, word))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _tell(self, url: str, word: str) -> None:
        limit = aiohttp.ClientTimeout(total=TIMEOUT_S)
        headers = {HEADER: word}
        try:
            async with self._session.post(
                url + FALSE_ALARM_PATH, headers=headers, timeout=limit
            ) as response:
                if response.status >= 400:
                    log(event="not_withdrawn", worker=url, message=f"status {response.status}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log(event="not_withdrawn", worker=url, message=str(error) or type(error).__name__)
