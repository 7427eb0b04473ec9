"""ASGI middleware right around stock's routes: it takes our field out of a request's body.

    body with the field -> Answer in a context variable -> stock's route, without the field
    response            -> what the client has already is left out; a refusal is a 400

Stock generates in the same task as it sends, so whatever it sends between two tokens belongs to
the first of them. `serving.py` says through the `Answer` which those are. A middleware that hands
messages to another task may not stand between the two: this one is the innermost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.resume import wire

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

App = Callable[["Scope", "Receive", "Send"], Awaitable[None]]


async def _to_nobody(_ids: list[int]) -> None: ...


@dataclass
class Answer:
    """An answer that is to be resumed, from the body of its request to its last event."""

    ask: wire.Ask
    path: str = ""
    claimed: bool = False
    """Whether stock's generation has begun for it."""
    silent: bool = False
    """Whether the client has what is sent now."""
    error: str | None = None
    """Why it cannot be resumed."""
    obj: Any = None
    """Stock's request object."""
    shown: dict[str, Any] | None = field(default=None, repr=False)
    """Stock's output for the tokens that were given, before the first new one."""
    report: Callable[[list[int]], Awaitable[None]] = field(default=_to_nobody, repr=False)
    """Says tokens of the stream, behind the events that have been sent."""

    def __post_init__(self) -> None:
        self.silent = bool(self.ids)

    @property
    def ids(self) -> list[int]:
        return self.ask.ids


CURRENT: ContextVar[Answer | None] = ContextVar("sglang_scaling_fixes_resume", default=None)
"""The answer that the request of this task resumes."""


class Resuming:
    """Everything but a POST with our field passes unchanged."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        if path not in wire.PATHS:
            await self._app(scope, receive, send)
            return
        messages = await _whole(receive)
        try:
            found = wire.split(b"".join(message.get("body", b"") for message in messages))
        except wire.BadResumeError as error:
            await _refuse(send, path, str(error))
            return
        if found is None:
            await self._app(scope, _replaying(messages, receive), send)
            return
        body, ask = found
        replaced: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        reply = _Reply(Answer(ask, path), send)
        token = CURRENT.set(reply.answer)
        try:
            await self._app(_resized(scope, len(body)), _replaying(replaced, receive), reply.send)
        finally:
            CURRENT.reset(token)
        await reply.end()


async def _whole(receive: Receive) -> list[Message]:
    """The messages of a request's body, or of what came of it before the client went away."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replaying(messages: list[Message], receive: Receive) -> Receive:
    left = iter(messages)

    async def again() -> Message:
        for message in left:
            return message
        return await receive()

    return again


def _resized(scope: Scope, length: int) -> Scope:
    headers = [
        (name, str(length).encode() if name.lower() == b"content-length" else value)
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


class _Reply:
    """What stock sends, without what the client has. The status waits until it is known."""

    def __init__(self, answer: Answer, send: Send) -> None:
        self.answer = answer
        self._send = send
        self._start: Message | None = None
        self._begun = False
        self._refused = False
        self._unsaid: list[int] = []
        answer.report = self._report

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        answer = self.answer
        more = bool(message.get("more_body"))
        if self._succeeds() and not answer.claimed and not more:
            answer.error = str(wire.refused("this request generates nothing; leave the field out"))
        if answer.error is not None:
            await self.end()
            return  # whatever stock says of it, the client has our 400
        if answer.silent and more and self._succeeds():
            return
        await self._begin()
        await self._send(message)
        if more:
            await self._report([])

    def _succeeds(self) -> bool:
        """Whether stock began a response that is no error, and the client has nothing of it."""
        return self._start is not None and self._start["status"] < 300

    async def _begin(self) -> None:
        if self._start is None:
            return
        start, self._start = self._start, None
        self._begun = True
        headers = list(start.get("headers", ()))
        if start["status"] < 300:
            headers.append((wire.HEADER, str(len(self.answer.ids)).encode()))
        await self._send({**start, "headers": headers})

    async def _report(self, ids: list[int]) -> None:
        self._unsaid += ids
        if not self._begun or not self._unsaid:
            return  # their text is held back so far, and no event has begun the response
        comment, self._unsaid = wire.ids_comment(self._unsaid), []
        await self._send({"type": "http.response.body", "body": comment, "more_body": True})

    async def end(self) -> None:
        """Stock has nothing more to send, or the answer is refused."""
        if self.answer.error is not None and not self._refused:
            self._refused = True
            await _refuse(self._send, self.answer.path, self.answer.error)


async def _refuse(send: Send, path: str, message: str) -> None:
    body = wire.error_body(path, message)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
