"""What a 503 of ours says in HTTP that stock would not let it say.

A refusal or an abort is made in the scheduler, which can give it a status and a message; headers
and the type of an error are set where HTTP is spoken, in the main process. Ours are known by their
text, so that stock's own 503s stay as they are. Streams, whose status is 200, pass untouched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

Headers = list[tuple[bytes, bytes]]
Edit = Callable[[Headers, bytes], tuple[Headers, bytes]]
"""Headers and body of a 503, to what they shall be."""


class Refusals:
    """ASGI middleware. Everything but a 503 passes unchanged and unbuffered."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], edits: Sequence[Edit]
    ) -> None:
        self._app = app
        self._edits = edits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def edited(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] == 503:
                start = message  # its headers depend on the body that follows
                return
            if start is None:
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            await finish(message)

        async def finish(message: Message) -> None:
            nonlocal start
            assert start is not None
            headers, changed = list(start.get("headers", ())), body
            for edit in self._edits:
                headers, changed = edit(headers, changed)
            if changed != body:
                length = str(len(changed)).encode()
                headers = [(n, length if n.lower() == b"content-length" else v) for n, v in headers]
            await send({**start, "headers": headers})
            start = None
            await send({**message, "body": changed})

        await self._app(scope, receive, edited)
        if start is not None:  # the application left its body unfinished; so does ours
            await finish({"type": "http.response.body", "more_body": True})
