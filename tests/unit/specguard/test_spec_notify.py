"""Notifying a prefill server over real HTTP, and what happens when no server listens."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from sglang_scaling_fixes.specguard import notify
from sglang_scaling_fixes.specguard.taint import beginnings

PROMPT = list(range(200))
HANG_S = 20 * notify.ATTEMPTS * notify.TIMEOUT_S
"""A test hangs if one notification takes twenty times as long as its attempts may take."""


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


class Recording:
    """A notifier, and the outcomes that it counts."""

    def __init__(self) -> None:
        self._outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.notifier = notify.Notifier(self._outcomes.put)

    def outcome(self, port: int, host: str = "127.0.0.1") -> str:
        """Notifies, and waits until that one notification is counted."""
        self.notifier.notify(host, port, PROMPT)
        outcome = self._outcomes.get(timeout=HANG_S)
        assert self._outcomes.empty()
        return outcome


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's own quick attempt succeeds however busy this machine is."""
    monkeypatch.setattr(notify, "QUICK_S", HANG_S)


@pytest.mark.usefixtures("patient")
def test_prefill_is_sent_the_digests_and_no_tokens(port: int) -> None:
    assert Recording().outcome(port) == "delivered"
    assert [notify.read(body) for body in Handler.bodies] == [beginnings(PROMPT)]


@pytest.mark.usefixtures("patient")
def test_a_failure_is_tried_again(port: int) -> None:
    Handler.answers = [503, 503, 503]
    assert Recording().outcome(port) == "delivered"
    assert len(Handler.bodies) == 4  # one by the scheduler, three by the thread


@pytest.mark.usefixtures("patient")
def test_a_stock_prefill_is_soon_given_up_and_counted(port: int) -> None:
    Handler.answers = [404, 404]
    assert Recording().outcome(port) == "failed"
    assert len(Handler.bodies) == 2


def test_nobody_there_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    assert Recording().outcome(free) == "failed"


def test_what_is_no_http_is_counted_and_the_next_one_is_delivered(port: int) -> None:
    """The thread must outlive whatever answers it."""
    recording = Recording()
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
        assert recording.outcome(odd.getsockname()[1]) == "failed"
        odd.shutdown(socket.SHUT_RDWR)
    assert recording.outcome(port) == "delivered"
    assert recording.outcome(1, "no such host, is there?") == "failed"


def test_the_route_of_a_bootstrap_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real aiohttp application: good notifications go on, bad ones nowhere."""
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

    monkeypatch.setattr(notify, "_pass_on", pass_on)

    async def ask() -> list[int]:
        app = web.Application()
        notify.add_route(SimpleNamespace(app=app))
        async with TestClient(TestServer(app)) as client:
            body = json.dumps(beginnings(PROMPT))
            sent = [body, "{}", "[" * 5000, "x" * 2_000_000, body]
            return [(await client.post(notify.PATH, data=data)).status for data in sent]

    assert asyncio.run(ask()) == [200, 400, 400, 413, 503]
    assert passed[0] == beginnings(PROMPT)
