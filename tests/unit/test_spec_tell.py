"""Telling a prefill server, over real HTTP, and what becomes of it when nobody listens."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from sglang_scaling_fixes.specguard import tell
from sglang_scaling_fixes.specguard.taint import beginnings

PROMPT = list(range(200))


class Handler(BaseHTTPRequestHandler):
    answers: ClassVar[list[int]] = []
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.answers.pop(0) if self.answers else 200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Handler.answers, Handler.bodies = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def told(port: int, outcome: str) -> None:
    counts: Counter[str] = Counter()
    tell.Teller(lambda word: counts.update([word])).tell("127.0.0.1", port, PROMPT)
    for _ in range(500):
        if counts:
            break
        time.sleep(0.02)
    assert counts == {outcome: 1}


def test_prefill_is_told_the_digests_and_no_tokens(port: int) -> None:
    told(port, "told")
    assert tell.read(Handler.bodies[0]) == beginnings(PROMPT)


def test_a_failure_is_tried_again(port: int) -> None:
    Handler.answers = [503, 503, 503]
    told(port, "told")
    assert len(Handler.bodies) == 4  # one by the scheduler, three by the thread


def test_a_stock_prefill_is_soon_given_up_and_counted(port: int) -> None:
    Handler.answers = [404, 404]
    told(port, "failed")
    assert len(Handler.bodies) == 2


def test_nobody_there_is_counted(port: int) -> None:
    del port
    import socket

    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    told(free, "failed")


def test_what_is_no_http_is_counted_and_the_next_one_is_told(port: int) -> None:
    """The thread that tells must outlive whatever answers it."""
    import socket

    counts: Counter[str] = Counter()
    teller = tell.Teller(lambda word: counts.update([word]))
    with socket.create_server(("127.0.0.1", 0)) as odd:

        def answer() -> None:
            while True:
                try:
                    peer, _ = odd.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(65536)
                    peer.sendall(b"hello\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        teller.tell("127.0.0.1", odd.getsockname()[1], PROMPT)
        for _ in range(500):
            if counts:
                break
            time.sleep(0.02)
        odd.shutdown(socket.SHUT_RDWR)
    assert counts == {"failed": 1}
    teller.tell("127.0.0.1", port, PROMPT)
    assert counts == {"failed": 1, "told": 1}
    teller.tell("no such host, is there?", 1, PROMPT)
    for _ in range(500):
        if counts["failed"] == 2:
            break
        time.sleep(0.02)
    assert counts == {"failed": 2, "told": 1}


def test_the_route_of_a_bootstrap_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real aiohttp application: good tellings go on, bad ones nowhere."""
    from types import SimpleNamespace

    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    passed: list[Any] = []

    def pass_on(known: Any) -> Any:
        import concurrent.futures

        passed.append(known)
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None) if len(passed) == 1 else done.set_exception(RuntimeError("gone"))
        return done

    monkeypatch.setattr(tell, "_pass_on", pass_on)

    async def ask() -> list[int]:
        app = web.Application()
        tell.add_route(SimpleNamespace(app=app))
        async with TestClient(TestServer(app)) as client:
            body = json.dumps(beginnings(PROMPT))
            sent = [body, "{}", "[" * 5000, "x" * 2_000_000, body]
            return [(await client.post(tell.PATH, data=data)).status for data in sent]

    assert asyncio.run(ask()) == [200, 400, 400, 413, 503]
    assert passed[0] == beginnings(PROMPT)
