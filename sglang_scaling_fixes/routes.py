"""Paths of ours on a server's own port.

Stock's keys guard stock's paths. An answer here checks by itself who asks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

Answer = Callable[[Mapping[str, str]], Awaitable[tuple[HTTPStatus, str]]]
"""The headers of a POST, their names in small letters, to status and text. Its body is not read."""


class Routes:
    """ASGI middleware. Everything but a POST to one of the paths passes untouched."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        answers: Mapping[str, Answer],
    ) -> None:
        self._app = app
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        answer = self._answers.get(scope["path"]) if is_post else None
        if answer is None:
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): v.decode("latin-1") for name, v in scope["headers"]
        }
        status, text = await answer(headers)
        body = f"{text}\n".encode() if text else b""
        kind = [(b"content-type", b"text/plain; charset=utf-8")] if body else []
        await send({"type": "http.response.start", "status": int(status), "headers": kind})
        await send({"type": "http.response.body", "body": body})
