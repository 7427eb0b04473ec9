"""The middleware: who comes without the field notices nothing, who resumes gets what is new."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.resume import serving, wire
from sglang_scaling_fixes.resume.middleware import CURRENT, Answer, Resuming
from sglang_scaling_fixes.resume.wire import FIELD, HEADER

Messages = list[MutableMapping[str, Any]]
Stock = Callable[..., AsyncIterator[Any]]
N = 3
MANAGER = SimpleNamespace(incremental_streaming_output=False)


def asked(ids: Any = (1, 2, 3), **rest: Any) -> bytes:
    return json.dumps({FIELD: {"output_ids": list(ids)}, **rest}).encode()


def call(app: Any, body: bytes, path: str = "/generate", parts: int = 1) -> Messages:
    """What the server's client is sent."""
    step = -(-len(body) // parts)
    chunks = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
    incoming: Messages = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]
    sent: Messages = []

    async def receive() -> MutableMapping[str, Any]:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-length", str(len(body)).encode()), (b"x", b"y")],
    }
    asyncio.run(Resuming(app)(scope, receive, send))
    return sent


def outputs(stream: bool, *texts: str) -> Stock:
    """A stock `generate_request` whose outputs are cumulative."""

    async def generate(manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        del manager, obj, request
        for number, text in enumerate(texts, N + 1):
            if answer := CURRENT.get():
                answer.shown = answer.shown if number > N + 1 else shown()
            yield {"text": text, "meta_info": {"completion_tokens": number, "finish_reason": None}}
            if not stream:
                return

    return generate


def shown() -> dict[str, Any]:
    meta = {"completion_tokens": N, "finish_reason": None}
    return {"text": "abc", "output_ids": [1, 2, 3], "meta_info": meta}


def app_of(stock: Stock, *, stream: bool = True, seen: list[Any] | None = None) -> Any:
    """An application that answers with stock's outputs, one message for each."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        if seen is not None:
            seen.append((dict(scope["headers"]), body))
        obj = SimpleNamespace(stream=stream, sampling_params={}, rid="r")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            async for output in serving.generate(stock, MANAGER, obj):
                line = output["text"].encode()
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except ValueError as error:
            await send(
                {"type": "http.response.body", "body": str(error).encode(), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def text(sent: Messages) -> list[bytes]:
    return [message["body"] for message in sent if message["type"] == "http.response.body"]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("path", ["/generate", "/v1/files"])
def test_a_request_without_the_field_passes_as_it_is(parts: int, path: str) -> None:
    seen: list[Any] = []
    body = b'{"text": "x"}'
    sent = call(app_of(outputs(True, "a", "ab"), seen=seen), body, path, parts)
    assert seen == [({b"content-length": b"13", b"x": b"y"}, body)]
    assert text(sent) == [b"a", b"ab", b""]
    assert sent[0]["headers"] == []


@pytest.mark.parametrize("parts", [1, 4])
def test_the_route_gets_the_body_without_the_field(parts: int) -> None:
    seen: list[Any] = []
    call(app_of(outputs(True, "abcd"), seen=seen), asked(text="x"), parts=parts)
    ((headers, body),) = seen
    assert json.loads(body) == {"text": "x"}
    assert headers[b"content-length"] == str(len(body)).encode()


def test_a_stream_begins_with_what_is_new() -> None:
    sent = call(app_of(outputs(True, "abcd", "abcde")), asked())
    assert text(sent) == [b"abcd", b"abcde", b""]
    assert (HEADER, b"3") in sent[0]["headers"]


def test_without_the_middleware_a_stream_begins_with_what_was_given() -> None:
    """The control: what stock sends for the given tokens is left out by the middleware only."""
    sent: Messages = []

    async def run() -> None:
        token = CURRENT.set(wire_answer())
        try:
            await app_of(outputs(True, "abcd"))({"headers": []}, receive, send)
        finally:
            CURRENT.reset(token)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(run())
    assert text(sent) == [b"abc", b"abcd", b""]


def wire_answer() -> Answer:
    return Answer(wire.Ask([1, 2, 3]), "/generate")


def test_a_stream_says_its_tokens_behind_their_events() -> None:
    """Each comment comes when all events of its tokens have been sent."""

    async def stock(manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        del manager, obj, request
        answer = CURRENT.get()
        assert answer is not None
        answer.shown = shown()
        for ids in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6]):
            meta = {"completion_tokens": len(ids), "finish_reason": None}
            yield {"text": f"t{len(ids)}", "output_ids": ids, "meta_info": meta}

    body = json.dumps({FIELD: {"output_ids": [1, 2, 3], "report_ids": True}}).encode()
    assert text(call(app_of(stock), body)) == [
        b"t4",
        wire.ids_comment([4]),
        b"t6",
        wire.ids_comment([5, 6]),
        b"",
    ]


def test_a_whole_answer_is_sent_whole() -> None:
    sent = call(app_of(outputs(False, "abcd"), stream=False), asked())
    assert text(sent) == [b"abcd", b""]


@pytest.mark.parametrize("given", [[], [1, 2, 3]])
def test_an_opening_is_left_out_only_if_the_client_has_it(given: list[int]) -> None:
    """Some APIs open a stream before anything is generated."""
    inner = app_of(outputs(True, "abcd"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def behind(message: dict[str, Any]) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                await send({"type": "http.response.body", "body": b"opens", "more_body": True})

        await inner(scope, receive, behind)

    body = json.dumps({FIELD: {"output_ids": given, "report_ids": True}}).encode()
    sent = text(call(app, body))
    assert (sent[0] == b"opens") == (not given)
    assert b"abcd" in sent


@pytest.mark.parametrize("stream", [False, True])
def test_what_stock_finds_wrong_with_it_is_a_400(stream: bool) -> None:
    message = str(wire.refused("it has ended; give fewer"))

    async def stock(manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        del manager, obj, request
        yield {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": message}}}

    sent = call(app_of(stock, stream=stream), asked())
    assert [part["type"] for part in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["message"] == message


def test_an_error_of_stocks_own_is_stocks() -> None:
    async def stock(manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        del manager, obj, request
        raise ValueError("context too long")
        yield

    sent = call(app_of(stock), asked())
    assert sent[0]["status"] == 200  # as stock says it in a stream
    assert text(sent) == [b"context too long", b""]


def test_a_bad_field_never_reaches_stock() -> None:
    seen: list[Any] = []
    sent = call(app_of(outputs(True, "a"), seen=seen), asked(["x"]), "/v1/messages")
    assert not seen
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["type"] == "error"


def test_a_route_that_generates_nothing_says_so() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    sent = call(app, asked())
    assert sent[0]["status"] == 400 and "generates nothing" in str(sent[1]["body"])


def test_only_the_first_generation_of_a_request_is_resumed() -> None:
    """A route that calls tools itself asks the model again, with another prompt."""
    claims = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            obj = SimpleNamespace(stream=False, sampling_params={}, rid="r")
            async for _ in serving.generate(outputs(False, "abcd"), MANAGER, obj):
                answer = CURRENT.get()
                claims.append(answer is not None and answer.obj is obj)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    call(app, asked())
    assert claims == [True, False]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_data", ["x"]),
        ("input_embeds", [[0.5]]),
        ("session_params", {"id": "s"}),
        ("return_hidden_states", True),
        ("text", ["a", "b"]),
        ("sampling_params", {"n": 2}),
    ],
)
def test_what_cannot_be_resumed_is_refused(field: str, value: Any) -> None:
    obj = SimpleNamespace(**{"stream": True, "sampling_params": {}, field: value})
    with pytest.raises(wire.BadResumeError):
        serving.check(obj)


def test_logprobs_of_the_prompt_are_refused_and_those_of_new_tokens_are_not() -> None:
    obj = SimpleNamespace(stream=True, sampling_params={}, return_logprob=True)
    serving.check(obj)
    obj.logprob_start_len = 0
    with pytest.raises(wire.BadResumeError, match="logprob_start_len 0"):
        serving.check(obj)


class Manager:
    """As much of stock's TokenizerManager as `serving.output` needs."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(event=asyncio.Event(), out_list=[], get_text=lambda: "abc")
        self.rid_to_state = {"r": self.state}

    async def handle(self, received: Any) -> None:
        tokens = received.completion_tokens[0]
        self.state.out_list.append(
            {"text": None, "output_ids": [1] * tokens, "meta_info": {"completion_tokens": tokens}}
        )
        self.state.event.set()


@pytest.mark.parametrize(("tokens", "reason", "is_shown"), [(3, None, True), (4, None, False)])
def test_what_was_given_does_not_wake_stocks_waiter(
    tokens: int, reason: Any, is_shown: bool
) -> None:
    async def run() -> None:
        manager, answer = Manager(), wire_answer()
        serving._awaited["r"] = answer
        received = SimpleNamespace(
            rids=["r"], finished_reasons=[reason], completion_tokens=[tokens]
        )
        await serving.output(Manager.handle, manager, received)
        assert (answer.shown is not None) == is_shown
        assert manager.state.event.is_set() != is_shown
        assert (manager.state.out_list == []) == is_shown
        assert "r" not in serving._awaited
        if answer.shown is not None:
            assert answer.shown["text"] == "abc"

    asyncio.run(run())
