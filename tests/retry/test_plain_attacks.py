"""What a hostile reader tried on streams that are gone on with without the plugin.

Each failed on the first form of `retry.plain`. The workers say exactly what a script tells them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.retry.fake_worker import DONE, FakeWorker, Seen, chunk, whole
from tests.retry.progress import run
from tests.retry.serving import Answer, post, proxying
from tests.retry.test_migrations import error_of

BREAK: dict[str, Any] = {"break": True}
GENERATE = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 20}}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
STOP = {"type": "stop"}
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
Script = Callable[[dict[str, Any]], list[dict[str, Any]] | int]


def tokens(ids: list[int], text: str, *, count: int | None = None, finish: Any = None) -> Any:
    """An event of /generate; `count`: as it says how many tokens there are."""
    count = len(ids) if count is None else count
    meta = {"id": "x", "prompt_tokens": 3, "completion_tokens": count, "finish_reason": finish}
    return {"output_ids": ids, "text": text, "meta_info": meta}


def delta(content: str | None = None, finish: str | None = None, **more: Any) -> Any:
    said = more if content is None else {"content": content, **more}
    return {"id": "c", "choices": [{"index": 0, "delta": said, "finish_reason": finish}]}


class Scripted(FakeWorker):
    """Answers the next generations as told, whoever of the fleet is asked; then as the last one."""

    def __init__(self, name: str, scripts: list[Script], late: float = 0.0) -> None:
        super().__init__(name)
        self._scripts = scripts
        self._late = late

    async def _answer(self, one: Seen, writer: asyncio.StreamWriter) -> bool:
        if one.method == "GET":
            return await super()._answer(one, writer)
        await asyncio.sleep(self._late)
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        events = script(one.said)
        if isinstance(events, int):
            await self._send(writer, whole(b'{"error": {"message": "no"}}', events))
            return True
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        await self._send(writer, head + b"Transfer-Encoding: chunked\r\n\r\n")
        for event in events:
            if event is BREAK:
                return False
            await self._send(writer, chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
            await asyncio.sleep(0.001)
        await self._send(writer, chunk(DONE) + b"0\r\n\r\n")
        return True


async def ask(
    path: str, body: dict[str, Any] | bytes, *scripts: Script, **options: Any
) -> tuple[Answer, list[Seen]]:
    """The client's answer, and what the workers were asked."""
    left = list(scripts)
    async with (
        Scripted("a", left) as a,
        Scripted("b", left) as b,
        proxying([a, b], **options) as proxy,
    ):
        said = body if isinstance(body, bytes) else {**body, "stream": True}
        answer = await post(proxy.url + path, said)
        return answer, [*a.generations, *b.generations]


def says(*events: Any) -> Script:
    return lambda said: list(events)


def data(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(event[6:]) for event in answer.events if event.startswith(b"data: {")]


# -- never a wrong or a doubled token -------------------------------------------------------


def test_what_a_guard_suspects_is_not_gone_on_with_though_the_client_has_nothing() -> None:
    async def test() -> None:
        message = "kv_anomaly: bad [rule=floor suspicion=a suspect_from=1]"
        error = {"error": {"type": "SERVICE_UNAVAILABLE", "code": 503, "message": message}}
        spoiled = says(ROLE, delta("good "), delta("CORRUPT "), delta("CORRUPT "), error)
        right = says(ROLE, delta("good "), delta("right "), delta(finish="stop"))
        options = {"migrations": 1, "trail_tokens": 50}
        answer, asked = await ask("/v1/chat/completions", CHAT, spoiled, right, **options)
        assert b"CORRUPT" not in answer.body and b"right" in answer.body
        assert all(one.said["messages"][-1]["role"] == "user" for one in asked)

    run(test)


@pytest.mark.parametrize("limit", [3, None])
def test_an_answer_goes_on_for_what_is_left_of_its_limit(limit: int | None) -> None:
    async def test() -> None:
        body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": limit}}
        first = says(tokens([10], "a"), tokens([10, 11], "ab"), BREAK)
        finish = {"type": "length", "length": 1}
        answer, asked = await ask(
            "/generate", body, first, says(tokens([12], "c", finish=finish)), migrations=1
        )
        left = [one.said["sampling_params"]["max_new_tokens"] for one in asked]
        assert sorted(left, key=str) == sorted([limit, limit and limit - 2], key=str)
        last = data(answer)[-1]
        assert (last["text"], last["output_ids"]) == ("abc", [10, 11, 12])
        assert last["meta_info"]["finish_reason"]["length"] == 3

    run(test)


def test_a_worker_that_streams_parts_does_not_go_on_with_wholes() -> None:
    async def test() -> None:
        first = says(tokens([10], "a"), tokens([10, 11], "ab"), BREAK)
        parts = says(
            tokens([12], "c"), tokens([13], "d", count=2), tokens([14], "e", count=3, finish=STOP)
        )
        answer, _ = await ask("/generate", GENERATE, first, parts, migrations=1)
        texts = [event["text"] for event in data(answer) if "text" in event]
        assert texts == ["a", "ab"] and error_of(answer)["retryable"] is True

    run(test)


def test_an_event_alone_does_not_show_that_the_next_one_says_it_again() -> None:
    async def test() -> None:
        parts = says(tokens([11], "b"), tokens([12], "c", count=2, finish=STOP))
        answer, asked = await ask(
            "/generate", GENERATE, says(tokens([10], "a"), BREAK), parts, migrations=1
        )
        assert all(one.said["input_ids"] == [1, 2, 3] for one in asked)
        assert [event["text"] for event in data(answer)] == ["b", "c"]

    run(test)


@pytest.mark.parametrize("more", [{"reasoning_content": "is 42"}, {"tool_calls": [{}]}])
def test_a_continuation_that_is_no_plain_text_is_none(more: dict[str, Any]) -> None:
    async def test() -> None:
        first = says(ROLE, delta("The answer "), BREAK)
        second = says(ROLE, delta(**more), delta(finish="stop"))
        answer, _ = await ask("/v1/chat/completions", CHAT, first, second, migrations=1)
        assert b"42" not in answer.body and error_of(answer)["retryable"] is True

    run(test)


def test_half_a_character_behind_a_space_is_not_gone_on_behind() -> None:
    """Of the token b" \\xf0\\x9f" stock says the space."""

    async def test() -> None:
        first = says(tokens([9], "O"), tokens([9, 10], "Oh"), tokens([9, 10, 11], "Oh "), BREAK)
        second = says(tokens([11], " "), tokens([11, 12], " ☺", finish=STOP))
        answer, asked = await ask("/generate", GENERATE, first, second, migrations=1)
        assert max(len(one.said["input_ids"]) for one in asked) == 5
        assert data(answer)[-1]["text"] == "Oh ☺"

    run(test)


def test_usage_of_a_part_is_not_said() -> None:
    async def test() -> None:
        usage = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 2}}
        first = says(ROLE, delta("a "), BREAK)
        second = says(ROLE, delta("b"), delta(finish="stop"), usage)
        answer, _ = await ask("/v1/chat/completions", CHAT, first, second, migrations=1)
        assert b"usage" not in answer.body and b'"b"' in answer.body

    run(test)


@pytest.mark.parametrize("n", [2.0, "2", 2])
def test_several_answers_are_not_taken_for_one(n: Any) -> None:
    async def test() -> None:
        def one(index: int, text: str) -> Any:
            return {"id": "c", "choices": [{"index": index, "delta": {"content": text}}]}

        first = says(one(0, "A1 "), one(1, "B1 "), one(0, "A2 "), BREAK)
        answer, asked = await ask(
            "/v1/chat/completions", {**CHAT, "n": n}, first, first, migrations=1
        )
        assert len(asked) == 1 and "error" in data(answer)[-1]

    run(test)


# -- never worse than without -----------------------------------------------------------------


@pytest.mark.parametrize("refusal", ["status", "event"])
def test_a_continuation_that_is_refused_is_begun_anew(refusal: str) -> None:
    async def test() -> None:
        def refuses(said: dict[str, Any]) -> list[dict[str, Any]] | int:
            if said["messages"][-1]["role"] == "user":
                return [ROLE, delta("a "), delta("b "), delta(finish="stop")]
            return 400 if refusal == "status" else [{"error": {"message": "no", "code": 400}}]

        first = says(ROLE, delta("a "), delta("b "), BREAK)
        options = {"hold_tokens": 50, "migrations": 2}
        answer, _ = await ask("/v1/chat/completions", CHAT, first, refuses, **options)
        assert answer.status == 200 and answer.body.count(b'"a "') == 1

    run(test)


@pytest.mark.parametrize(
    "odd", [b'"metadata":{"x":1e999}', b'"metadata":"\xff"', b'"messages":[3]']
)
def test_odd_bodies_are_served_as_ever(odd: bytes) -> None:
    async def test() -> None:
        body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true,' + odd + b"}"
        well = says(ROLE, delta("a "), delta(finish="stop"))
        without, _ = await ask("/v1/chat/completions", body, well)
        found, asked = await ask("/v1/chat/completions", body, well, migrations=1)
        assert (found.status, found.body) == (without.status, without.body)
        assert len(asked) == (without.status == 200)

    run(test)


def test_a_limit_that_is_no_number_ends_with_an_error_event() -> None:
    async def test() -> None:
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": "20"}}
        first = says(tokens([10], "a"), tokens([10, 11], "ab"), BREAK)
        answer, asked = await ask("/generate", body, first, migrations=1)
        assert len(asked) == 1 and "no number" in error_of(answer)["message"]

    run(test)


@pytest.mark.parametrize("options", [{"hold_tokens": 4}, {"trail_tokens": 288}])
def test_what_cannot_be_gone_on_with_is_not_held(options: dict[str, int]) -> None:
    """A reasoning stream longer than what may be held."""

    async def test() -> None:
        events = [
            ROLE,
            *[delta(reasoning_content="r" * 300)] * 60,
            delta("x"),
            delta(finish="stop"),
        ]
        answer, _ = await ask(
            "/v1/chat/completions", CHAT, says(*events), hold_bytes=8192, migrations=1, **options
        )
        assert answer.status == 200 and len(answer.events) == len(events) + 1

    run(test)


def test_tokens_that_say_nothing_reach_the_client() -> None:
    async def test() -> None:
        events = [tokens([10] + [151643] * i, "a") for i in range(400)]
        answer, _ = await ask(
            "/generate", GENERATE, says(*events), hold_bytes=1 << 16, migrations=1
        )
        assert answer.status == 200 and len(answer.events) == 401

    run(test)


def test_a_trail_that_grows_too_large_is_let_go() -> None:
    async def test() -> None:
        events = [tokens(list(range(100, 100 + i)), " word" * i) for i in range(1, 400)]
        answer, _ = await ask(
            "/generate",
            GENERATE,
            says(*events),
            hold_bytes=1 << 18,
            migrations=1,
            trail_tokens=288,
        )
        assert answer.status == 200 and len(answer.events) == 400
        assert b"too_large" not in answer.body

    run(test)


@pytest.mark.parametrize(
    "options", [{}, {"migrations": 1, "trail_tokens": 288}, {"hold_tokens": 30}]
)
def test_a_prefill_may_answer_later_than_a_first_token(options: dict[str, Any]) -> None:
    async def test() -> None:
        decoded = [tokens(list(range(100, 100 + i)), " a" * i) for i in range(1, 11)]
        slow = says(*decoded)
        async with (
            Scripted("p", [says(tokens([100], "a", finish=STOP))], late=0.8) as prefill,
            Scripted("d", [slow]) as decode,
            proxying(
                prefills=[prefill], decodes=[decode], first_token_timeout=0.4, **options
            ) as proxy,
        ):
            answer = await post(proxy.url + "/generate", {**GENERATE, "stream": True})
            assert answer.status == 200 and b'"error"' not in answer.body
            assert len(decode.generations) == 1

    run(test)


def test_what_is_no_stream_has_no_first_token() -> None:
    async def test() -> None:
        async with (
            Scripted("a", [lambda said: 200], late=0.6) as a,
            proxying([a], first_token_timeout=0.3) as proxy,
        ):
            said = {"input": "x", "stream": True}
            assert (await post(proxy.url + "/v1/embeddings", said)).status == 200

    run(test)
