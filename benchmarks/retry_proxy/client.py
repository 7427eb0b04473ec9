"""A client that costs as little as one can: it counts events and looks at no other byte."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import cast

from benchmarks.retry_proxy.worker import LAST

_BEGINNING, _END = b"data: {", LAST[-5:]


class _Counter(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.events = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        self.events += data.count(_BEGINNING)
        self._tail = data[1 - len(_BEGINNING) :]
        if data.endswith(_END):
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("the stream was cut off"))


async def streams(port: int, count: int, events: int, interval: float) -> float:
    """`count` streams at once. Seconds until the last one ended; raises if an event is missing."""
    loop = asyncio.get_running_loop()
    request = _request({"stream": True, "events": events, "interval": interval})
    begun = time.perf_counter()
    made = [
        await loop.create_connection(lambda: _Counter(request), "127.0.0.1", port)
        for _ in range(count)
    ]
    await asyncio.gather(*(counter.done for _, counter in made))
    took = time.perf_counter() - begun
    for transport, counter in made:
        transport.close()
        if counter.events != events:
            raise RuntimeError(f"{counter.events} events of {events} arrived")
    return took


async def stopped(port: int, count: int, events: int, size: int, seconds: float) -> None:
    """`count` clients that ask for a stream and read nothing of it, for so long."""
    loop = asyncio.get_running_loop()
    request = _request({"stream": True, "events": events, "interval": 0, "size": size})
    made = []
    for _ in range(count):
        transport, _ = await loop.create_connection(lambda: _Counter(request), "127.0.0.1", port)
        transport.pause_reading()
        made.append(transport)
    await asyncio.sleep(seconds)
    for transport in made:
        transport.abort()


class Caller:
    """Small requests, one after the other on one connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = _request({"text": "hello", "sampling_params": {"max_new_tokens": 20}})

    def call(self) -> float:
        """Seconds from sending the request to having the whole answer."""
        begun = time.perf_counter()
        self._socket.sendall(self._request)
        got = b""
        while not got.endswith(b"}"):
            if not (part := self._socket.recv(1 << 16)):
                raise ConnectionError("the answer was cut off")
            got += part
        return time.perf_counter() - begun

    def close(self) -> None:
        self._socket.close()


def _request(said: dict[str, object]) -> bytes:
    body = json.dumps(said).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
