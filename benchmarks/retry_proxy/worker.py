"""A worker that costs as little as one can: prepared bytes, one write per event.

A GET gives a small JSON body. `POST /generate` gives a stream as its body says: `events`, the
`interval` in seconds between them (0: as fast as they are taken), and their `size` in bytes if
they are to be large.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

_TEXT = {"content": " token"}
_CHUNK: dict[str, Any] = {
    "id": "0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "model",
    "choices": [{"index": 0, "delta": _TEXT, "logprobs": None, "finish_reason": None}],
}
_EVENT = b"data: " + json.dumps(_CHUNK).encode() + b"\n\n"
EVENT = f"{len(_EVENT):x}\r\n".encode() + _EVENT + b"\r\n"
"""As a chunk of the body, 240 bytes: what stock sends for a token of a chat."""
_DONE = b"data: [DONE]\n\n"
LAST = f"{len(_DONE):x}\r\n".encode() + _DONE + b"\r\n0\r\n\r\n"
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_BODY = json.dumps({"text": " token" * 20, "meta_info": {"finish_reason": {"type": "stop"}}})
WHOLE = (
    f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(_BODY)}\r\n\r\n"
    f"{_BODY}"
).encode()


class Worker(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self) -> None:
        self._got = b""
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, blank, body = self._got.partition(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if not blank or len(body) < length:
            return
        self._got = b""
        said = json.loads(body) if body else {}
        if said.get("events"):
            event = _large(said["size"]) if said.get("size") else EVENT
            self._task = asyncio.create_task(self._stream(said["events"], said["interval"], event))
        else:
            self._transport.write(WHOLE)

    async def _stream(self, events: int, interval: float, event: bytes) -> None:
        self._transport.write(STREAM)
        for number in range(events):
            if interval:  # never two at once to catch up: the proxy is to read them one by one
                await asyncio.sleep(interval)
            await self._may_write.wait()
            self._transport.write(event)
            if not interval and number % 8 == 7:
                await asyncio.sleep(0)
        self._transport.write(LAST)


def _large(size: int) -> bytes:
    event = b'data: {"pad": "' + b"x" * size + b'"}\n\n'
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


async def main() -> None:
    """Prints its port and serves until it is ended."""
    server = await asyncio.get_running_loop().create_server(Worker, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    sys.exit(uvloop.run(main()))
