"""Notifying a prefill server over real HTTP, and what happens when no server listens."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.routes import Routes
from sglang_scaling_fixes.specguard import attach, notify, tellings
from sglang_scaling_fixes.specguard.guard import SpecGuard
from sglang_scaling_fixes.specguard.tellings import Telling
from sglang_scaling_fixes.vouch import FALSE_ALARM, FALSE_ALARM_PATH, HEADER, UNGUARDED, vouch

ACCUSED, WITHDRAWN = Telling(5, 2**62), Telling(5)
SECRET = b"a secret that both of them know"
FOR_EVER = 2**33
HANG_S = 20 * notify.ATTEMPTS * notify.TIMEOUT_S
"""A test hangs if one notification takes twenty times as long as its attempts may take."""


class Handler(BaseHTTPRequestHandler):
    answers: ClassVar[list[int]] = []
    bodies: ClassVar[list[bytes]] = []
    words: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.words.append(self.headers[HEADER])
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.answers.pop(0) if self.answers else 200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Handler.answers, Handler.bodies, Handler.words = [], [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class Recording:
    """A notifier, and the outcomes that it counts."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.notifier = notify.Notifier(self._outcomes.put, secret)

    def outcome(self, port: int, host: str = "127.0.0.1") -> str:
        """Notifies, and waits until that one notification is counted."""
        self.notifier.accuse(host, port, ACCUSED)
        return self._counted()

    def withdrawn(self, name: int) -> str:
        self.notifier.withdraw(name)
        return self._counted()

    def _counted(self) -> str:
        outcome = self._outcomes.get(timeout=HANG_S)
        assert self._outcomes.empty()
        return outcome


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's own quick attempt succeeds however busy this machine is."""
    monkeypatch.setattr(notify, "QUICK_S", HANG_S)


@pytest.mark.usefixtures("patient")
def test_prefill_is_sent_the_room_and_told_when_it_was_a_false_alarm(port: int) -> None:
    recording = Recording(SECRET)
    assert recording.outcome(port) == "delivered"
    assert recording.withdrawn(ACCUSED.name) == "delivered"
    recording.notifier.withdraw(ACCUSED.name)  # once
    recording.notifier.withdraw(99)  # of no accusation of ours
    assert recording._outcomes.empty()
    assert [tellings.read(body) for body in Handler.bodies] == [ACCUSED, WITHDRAWN]
    for telling, word in zip((ACCUSED, WITHDRAWN), Handler.words, strict=True):
        assert word is not None and telling.is_signed(SECRET, word, 0)


@pytest.mark.usefixtures("patient")
def test_without_a_secret_nothing_is_signed(port: int) -> None:
    Recording().outcome(port)
    assert Handler.words == [None]


@pytest.mark.usefixtures("patient")
def test_a_prefill_with_another_secret_is_soon_given_up(port: int) -> None:
    Handler.answers = [403, 403]
    assert Recording(SECRET).outcome(port) == "failed"
    assert len(Handler.bodies) == 2


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


class Schedulers:
    """What the main process sends them, in place of stock's broadcast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[Telling | None] = []
        self.gone = False
        monkeypatch.setattr(notify, "_broadcast", self._broadcast)

    def _broadcast(self, telling: Telling, secret: bytes | None) -> concurrent.futures.Future[None]:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_exception(RuntimeError("gone")) if self.gone else done.set_result(None)
        self.told.append(tellings.from_fields(telling.fields(secret), secret))
        return done


def bootstrap(secret: bytes | None, *sent: tuple[Any, str]) -> list[int]:
    """The answers of a prefill server's route, on a real aiohttp application."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def ask() -> list[int]:
        app = web.Application()
        notify.add_route(SimpleNamespace(app=app), lambda: secret)
        async with TestClient(TestServer(app)) as client:
            return [
                (await client.post(notify.PATH, data=body, headers={HEADER: word})).status
                for body, word in sent
            ]

    return asyncio.run(ask())


def test_the_route_of_a_bootstrap_server(monkeypatch: pytest.MonkeyPatch) -> None:
    schedulers = Schedulers(monkeypatch)
    body = ACCUSED.body()
    sent = [(data, "") for data in (body, b"{}", b"[" * 5000, b"x" * 2_000_000)]
    assert bootstrap(None, *sent) == [200, 400, 400, 413]
    assert schedulers.told == [ACCUSED]
    schedulers.gone = True
    assert bootstrap(None, (body, "")) == [503]


def test_with_a_secret_prefill_takes_what_is_signed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    schedulers = Schedulers(monkeypatch)
    word = ACCUSED.word(SECRET, 2**32)
    body, other = ACCUSED.body(), Telling(5, 6).body()
    assert bootstrap(SECRET, (body, word), (body, ""), (other, word)) == [200, 403, 403]
    assert bootstrap(SECRET, (WITHDRAWN.body(), WITHDRAWN.word(SECRET, 2**32))) == [200]
    assert bootstrap(SECRET, (body, ACCUSED.word(SECRET, 0))) == [403]  # expired
    assert schedulers.told == [ACCUSED, WITHDRAWN]


def test_without_a_secret_nobody_can_withdraw(monkeypatch: pytest.MonkeyPatch) -> None:
    schedulers = Schedulers(monkeypatch)
    assert bootstrap(None, (WITHDRAWN.body(), "")) == [403]
    assert schedulers.told == []


def test_a_flood_of_notifications_does_not_reach_the_schedulers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedulers = Schedulers(monkeypatch)
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    found = bootstrap(None, *[(ACCUSED.body(), "")] * (notify.PER_SECOND + 5))
    assert found == [200] * notify.PER_SECOND + [429] * 5
    assert len(schedulers.told) == notify.PER_SECOND


def test_so_many_in_every_second() -> None:
    pace = notify.Pace(2)
    assert [pace.allows(now) for now in (0, 0.5, 0.9, 1.0, 1.1, 1.9, 5)] == [
        True, True, False, True, True, False, True,
    ]  # fmt: skip


# -- the retry proxy, at a server's own port -------------------------------------------------------


def ask_to_withdraw(secret: bytes | None, **headers: str) -> tuple[int, str]:
    """Through our middleware around a real ASGI application, which knows no such path."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()

    async def answer(found: Any) -> Any:
        return await notify.withdraw(found, lambda: secret)

    app.add_middleware(Routes, answers={FALSE_ALARM_PATH: answer})
    client = TestClient(app)
    assert client.get(FALSE_ALARM_PATH).status_code == 404
    assert client.post("/other").status_code == 404
    found = client.post(FALSE_ALARM_PATH, headers=headers)
    return found.status_code, found.text


def test_the_proxy_withdraws_a_suspicion(monkeypatch: pytest.MonkeyPatch) -> None:
    schedulers = Schedulers(monkeypatch)
    word = vouch(SECRET, FALSE_ALARM, "4af2-1", FOR_EVER)
    assert ask_to_withdraw(SECRET, **{HEADER: word}) == (204, "")
    assert schedulers.told == [Telling(tellings.number("4af2-1"))]
    schedulers.gone = True
    assert ask_to_withdraw(SECRET, **{HEADER: word})[0] == 503


def test_nobody_else_withdraws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    schedulers = Schedulers(monkeypatch)
    for word in (
        "",
        vouch(b"another secret, not that one", FALSE_ALARM, "4af2-1", FOR_EVER),
        vouch(SECRET, UNGUARDED, "4af2-1", FOR_EVER),
        vouch(SECRET, FALSE_ALARM, "4af2-1", 1),
    ):
        assert ask_to_withdraw(SECRET, **{HEADER: word})[0] == 403
    word = vouch(SECRET, FALSE_ALARM, "4af2-1", FOR_EVER)
    assert ask_to_withdraw(None, **{HEADER: word})[0] == 501
    assert schedulers.told == []


# -- to the schedulers -----------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("telling", [ACCUSED, WITHDRAWN])
def test_tellings_pass_through_json_and_through_stocks_message(
    telling: Telling, secret: bytes | None
) -> None:
    assert tellings.read(telling.body()) == telling
    fields = json.loads(json.dumps(telling.fields(secret)))
    assert all(type(value) is int and 0 <= value < 2**63 for value in fields.values())
    assert tellings.from_fields(fields, secret) == telling
    assert tellings.from_fields({"pp_max_micro_batch_size": 8}, secret) is None


def test_whoever_may_set_a_servers_state_cannot_speak_for_it() -> None:
    signed = ACCUSED.fields(SECRET)
    changed = {**signed, f"{tellings.FIELD}room": 7}
    unsigned = ACCUSED.fields(None)
    other = ACCUSED.fields(b"another secret, not that one")
    for fields in (changed, unsigned, other, {**signed, f"{tellings.FIELD}mac_0": None}):
        with pytest.raises(ValueError):
            tellings.from_fields(fields, SECRET)


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True, "a", None])
@pytest.mark.parametrize("name", ["name", "room"])
def test_whoever_may_set_a_servers_state_cannot_end_it(name: str, value: object) -> None:
    """By the adapter in a scheduler, which is given what anybody may send."""
    if (name, value) == ("room", None):
        return
    fields = {**ACCUSED.fields(None), f"{tellings.FIELD}{name}": value}
    told: list[Telling | None] = []
    guard = SimpleNamespace(sharing=SimpleNamespace(secret=None), told=told.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecGuard, "current", guard)
        patch.setattr(attach, "_updated", lambda: "updated")
        request = SimpleNamespace(server_args=fields)
        assert attach._set_internal_state(lambda *_: "stock", None, request) == "updated"
        assert told == [None]
        patch.setattr(SpecGuard, "current", None)
        assert attach._set_internal_state(lambda *_: "stock", None, request) == "updated"
        other = SimpleNamespace(server_args={"pp_max_micro_batch_size": 8})
        assert attach._set_internal_state(lambda *_: "stock", None, other) == "stock"


@given(st.binary(max_size=200))
def test_hostile_notifications_are_an_error_and_nothing_else(body: bytes) -> None:
    try:
        tellings.read(body)
    except (ValueError, RecursionError):
        return


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"room": 1}', b'{"name": 1.5}', b'{"name": -1}', b'{"name": true}',
     b'{"name": 1, "room": "1"}', b'{"name": 9223372036854775808}', b" " * 5000],
)  # fmt: skip
def test_what_is_no_notification(body: bytes) -> None:
    with pytest.raises(ValueError):
        tellings.read(body)
