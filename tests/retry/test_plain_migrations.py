"""Streams that are gone on with on workers without the plugin, by stock's own API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sglang_scaling_fixes.retry.plain import Unfit, plain
from sglang_scaling_fixes.retry.request import ClientRequest
from tests.retry.fake_worker import DONE, FakeWorker, Seen, chunk
from tests.retry.progress import run
from tests.retry.serving import Answer, Proxy, post, proxying
from tests.retry.test_migrations import error_of, without_names

PROMPT = [7, 8, 9]
TOKENS = 20
FIRST = 1000
HALF_CHARACTER = 9
"""This token and the next one are one character: stock says it with the second."""


class Stock(FakeWorker):
    """As stock: it knows no field of ours, and continues a prompt or an assistant's message."""

    def __init__(self, name: str, plans: list[dict[str, Any]]) -> None:
        super().__init__(name)
        self.resumes = None
        self._plans = plans
        """What becomes of the next streams, whoever is asked."""

    async def _stream(
        self, path: str, said: dict[str, Any], plan: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        plan = self._plans.pop(0) if self._plans else {}
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        await self._send(writer, head + b"Transfer-Encoding: chunked\r\n\r\n")
        for i, event in self._events(path, said):
            if plan.get("fail") == "close" and i == plan["after"]:
                return False
            if plan.get("fail") == "garbage" and i > plan["after"]:
                event["output_ids"] = event["output_ids"][-1:]
            await self._send(writer, chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
        await self._send(writer, chunk(DONE) + b"0\r\n\r\n")
        return True

    def _events(self, path: str, said: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        name = f"{self.name}-{len(self.seen)}"
        if path == "/generate":
            begin = sum(token >= FIRST for token in said["input_ids"])
            most = said["sampling_params"]["max_new_tokens"]
            return [
                (i, self._generated(name, begin, i, len(said["input_ids"]), i + 1 == begin + most))
                for i in range(begin, begin + most)
            ]
        last = said["messages"][-1]
        begin = len(last["content"].split()) if last["role"] == "assistant" else 0
        assert begin == 0 or said["continue_final_message"] is True
        deltas: list[tuple[int, dict[str, Any], str | None]] = [
            (begin, {"role": "assistant", "content": ""}, None),
            *((i, {"content": f"t{i} "}, None) for i in range(begin, TOKENS)),
            (TOKENS, {}, "stop"),
        ]
        return [
            (i, {"id": name, "choices": [{"index": 0, "delta": d, "finish_reason": why}]})
            for i, d, why in deltas
        ]

    @staticmethod
    def _generated(name: str, begin: int, i: int, prompt: int, last: bool) -> dict[str, Any]:
        text = "".join(f" t{k}" for k in range(begin, i + 1))
        whole = begin <= HALF_CHARACTER  # half a character alone says nothing
        text = text.replace(f" t{HALF_CHARACTER}", "")
        return {
            "text": text.replace(f" t{HALF_CHARACTER + 1}", "ü" if whole else ""),
            "output_ids": [FIRST + k for k in range(begin, i + 1)],
            "meta_info": {
                "id": name,
                "prompt_tokens": prompt,
                "completion_tokens": i + 1 - begin,
                "finish_reason": {"type": "length"} if last else None,
            },
        }


@dataclass
class Fleet:
    """The proxy before two stock workers."""

    proxy: Proxy
    workers: tuple[Stock, Stock]
    plans: list[dict[str, Any]]

    async def ask(self, path: str, plan: dict[str, Any], **more: Any) -> Answer:
        """A stream of this API; the first attempt fares as `plan` says."""
        self.plans[:] = [plan]
        return await post(self.proxy.url + path, {**BODIES[path], "stream": True, **more})

    @property
    def asked(self) -> list[Seen]:
        return [one for worker in self.workers for one in worker.generations]


@contextlib.asynccontextmanager
async def stock(**options: Any) -> AsyncIterator[Fleet]:
    plans: list[dict[str, Any]] = []
    async with (
        Stock("a", plans) as a,
        Stock("b", plans) as b,
        proxying([a, b], **options) as proxy,
    ):
        yield Fleet(proxy, (a, b), plans)


BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": TOKENS}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "say it"}]},
}


def closes(after: int) -> dict[str, Any]:
    return {"fail": "close", "after": after}


@pytest.mark.parametrize("trail", [0, 4])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("after", [0, 1, HALF_CHARACTER, HALF_CHARACTER + 1, TOKENS - 1])
def test_a_broken_stream_goes_on_without_the_plugin(path: str, after: int, trail: int) -> None:
    async def test() -> None:
        async with stock(migrations=1, trail_tokens=trail) as fleet:
            whole = await fleet.ask(path, {})
            answer = await fleet.ask(path, closes(after))
            assert without_names(answer) == without_names(whole)
            assert len(fleet.asked) == 3
        async with stock() as fleet:  # control
            answer = await fleet.ask(path, closes(max(after, 1)))
            assert error_of(answer)["retryable"] is True

    run(test)


def test_the_next_worker_is_asked_for_the_rest_only() -> None:
    async def test() -> None:
        async with stock(migrations=1) as fleet:
            await fleet.ask("/generate", closes(6))
            (said,) = [one.said for one in fleet.asked if len(one.said["input_ids"]) > len(PROMPT)]
            assert said["input_ids"] == [*PROMPT, *(FIRST + i for i in range(6))]
            assert said["sampling_params"] == {"max_new_tokens": TOKENS - 6}

    run(test)


@pytest.mark.parametrize(
    ("path", "more", "why"),
    [
        ("/generate", {"return_logprob": True}, "return_logprob"),
        (
            "/generate",
            {"sampling_params": {"max_new_tokens": TOKENS, "frequency_penalty": 1.0}},
            "sampling_params.frequency_penalty",
        ),
        ("/v1/chat/completions", {"max_tokens": 30}, "limit"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"tools": [{}]}, "tools"),
    ],
)
def test_what_cannot_be_continued_ends_with_an_error_that_says_why(
    path: str, more: dict[str, Any], why: str
) -> None:
    async def test() -> None:
        async with stock(migrations=1) as fleet:
            message = error_of(await fleet.ask(path, closes(6), **more))["message"]
            assert "fix resume" in message and why in message
            assert len(fleet.asked) == 1

    run(test)


@pytest.mark.parametrize(
    ("path", "said", "why"),
    [
        ("/generate", {"text": "x"}, "input_ids"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "user"),
        ("/v1/completions", {"prompt": "x"}, "/v1/completions"),
        ("/v1/messages", {"messages": []}, "/v1/messages"),
    ],
)
def test_what_is_unfit_is_said(path: str, said: dict[str, Any], why: str) -> None:
    request = SimpleNamespace(path=path, body=json.dumps(said).encode())
    with pytest.raises(Unfit, match=why):
        plain(cast(ClientRequest, request))


def test_a_worker_that_does_not_say_its_tokens_is_served_as_ever() -> None:
    """Told to stream only what is new, stock says a part of the tokens."""

    async def test() -> None:
        async with stock(migrations=1, trail_tokens=4) as fleet:
            answer = await fleet.ask("/generate", {"fail": "garbage", "after": 5})
            assert len(answer.events) == TOKENS + 1 and answer.events[-1] == DONE.strip()

    run(test)
