"""Decode notifies prefill that the KV of a request is suspect there too, or is not after all.

    decode scheduler -> POST http://bootstrap host:port/sglang_scaling_fixes/kv_anomaly
        -> prefill's main process -> stock's set_internal_state -> all its schedulers, in one step

The client's retry may reach the prefill server some milliseconds after the abort. So decode posts
before it ends the request, and prefill answers once the message is on its way to the schedulers.
There it is ahead of every later request, because both use the same queues.

The bootstrap server is the one address of a prefill server that decode knows in every release.
A notification names the request's room, and no tokens. With a secret, prefill takes only what is
signed. Without one, knowing the room is the proof: whoever served the request knows it. A stock
prefill server answers 404. That is counted and logged, because its cached prompt stays readable
there.

The retry proxy withdraws an accusation at decode's own port, and takes the second half of the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.specguard import tellings
from sglang_scaling_fixes.specguard.tellings import Telling
from sglang_scaling_fixes.vouch import FALSE_ALARM, HEADER, vouched

logger = logging.getLogger(__name__)

PATH = "/sglang_scaling_fixes/kv_anomaly"
QUICK_S = 0.25
"""Seconds that a scheduler waits for prefill at most, once per anomaly. A few ms are usual."""
TIMEOUT_S = 5.0
"""Seconds for one later attempt in the background."""
ATTEMPTS = 3
PAUSE_S = 10.0
"""Seconds in which a server that could not be notified is not tried again.

Notifications to it fail at once meanwhile."""
LIMIT = 1024
"""Notifications that may wait for the thread. At the limit a new one is lost, and counted so."""
PER_SECOND = 64
"""Notifications that a prefill server passes on to its schedulers: each interrupts them."""


class Notifier:
    """Posts once, quickly. If that fails, a thread tries again.

    `count(outcome)` is called once for each notification: `delivered`, `failed` or `lost`.
    """

    def __init__(self, count: Callable[[str], None], secret: bytes | None = None) -> None:
        self._count = count
        self._secret = secret
        self._told: OrderedDict[int, str] = OrderedDict()
        """Which server was told of the last accusations."""
        self._waiting: queue.Queue[tuple[str, Telling]] = queue.Queue(LIMIT)
        self._silent: dict[str, float] = {}
        threading.Thread(target=self._run, name="kv-anomaly-notifier", daemon=True).start()

    def accuse(self, host: str, port: int, telling: Telling) -> None:
        """`host` and `port`: prefill's bootstrap server."""
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        url = self._told[telling.name] = f"http://{host}:{port}{PATH}"
        if len(self._told) > LIMIT:
            self._told.popitem(last=False)
        self._notify(url, telling)

    def withdraw(self, name: int) -> None:
        """Tell the server that was told of this accusation, if one was."""
        if (url := self._told.pop(name, None)) is not None:
            self._notify(url, Telling(name))

    def _notify(self, url: str, telling: Telling) -> None:
        with contextlib.suppress(Exception):  # the thread tries again, and logs what fails
            quick = time.monotonic() >= self._silent.get(url, 0.0)
            if quick and self._post(url, telling, QUICK_S) == HTTPStatus.OK:
                self._count("delivered")
                return
        try:
            self._waiting.put_nowait((url, telling))
        except queue.Full:
            self._count("lost")

    def _run(self) -> None:
        while True:
            url, telling = self._waiting.get()
            self._count(self._send(url, telling))

    def _send(self, url: str, telling: Telling) -> str:
        """The outcome. A server that does not answer must not delay the others for long."""
        if time.monotonic() < self._silent.get(url, 0.0):
            return "failed"
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                status = self._post(url, telling, TIMEOUT_S)
            except Exception as error:  # also for an answer that is not HTTP, or a bad address
                problem = repr(error)
                continue
            if status == 200:
                self._silent.pop(url, None)
                return "delivered"
            problem = f"it answered {status}"
            if status in (404, 405):
                break  # the plugin does not run there
            if status == HTTPStatus.FORBIDDEN:
                problem += ": it has another --spec-guard-secret-file than this server"
                break
        self._silent[url] = time.monotonic() + PAUSE_S
        logger.warning(
            "sglang-scaling-fixes: the prefill server was not notified of a KV anomaly (%s: %s); a "
            "retry there may read suspect KV. Arm spec-guard on the prefill server too.",
            url,
            problem,
        )
        return "failed"

    def _post(self, url: str, telling: Telling, timeout: float) -> int:
        """The status of the answer. Raises any error of the network or of the other side."""
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            headers[HEADER] = telling.word(self._secret, time.time())
        request = urllib.request.Request(url, telling.body(), headers, method="POST")
        # The environment's proxies are not used: the address is on the servers' own network.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return int(error.code)


# -- the main process --------------------------------------------------------------------------


class Pace:
    """At most `limit` in any second that begins with one."""

    def __init__(self, limit: int = PER_SECOND) -> None:
        self._limit = limit
        self._began = float("-inf")
        self._count = 0

    def allows(self, now: float) -> bool:
        """`now` in seconds of any clock that does not go back."""
        if now - self._began >= 1.0:
            self._began, self._count = now, 0
        self._count += 1
        return self._count <= self._limit


def add_route(server: Any, secret: Callable[[], bytes | None]) -> None:
    """Let a stock bootstrap server accept notifications. `secret`: that of this process, now."""
    from aiohttp import web

    pace = Pace()

    async def accept(request: Any) -> Any:
        try:
            telling = tellings.read(await request.read())
        except (ValueError, RecursionError) as error:
            return web.Response(status=HTTPStatus.BAD_REQUEST, text=f"{error}\n")
        status, why = _judge(telling, request.headers.get(HEADER, ""), secret())
        if status == HTTPStatus.OK and not pace.allows(time.monotonic()):
            status, why = HTTPStatus.TOO_MANY_REQUESTS, "too many of them in this second"
        if status == HTTPStatus.OK:
            status, why = await pass_on(telling, secret())
        return web.Response(status=status, text=f"{why}\n")

    server.app.router.add_post(PATH, accept)


def _judge(telling: Telling, word: str, secret: bytes | None) -> tuple[HTTPStatus, str]:
    """Whether a notification may go on to the schedulers, which know its room or do not."""
    if secret is None and telling.room is None:
        return HTTPStatus.FORBIDDEN, "nobody can withdraw: no --spec-guard-secret-file here"
    if secret is not None and not telling.is_signed(secret, word, time.time()):
        return HTTPStatus.FORBIDDEN, "not signed with the secret of this server"
    return HTTPStatus.OK, "notified"


async def withdraw(
    headers: Mapping[str, str], secret: Callable[[], bytes | None]
) -> tuple[HTTPStatus, str]:
    """The answer to a POST to `FALSE_ALARM_PATH`."""
    known = secret()
    if known is None:
        return HTTPStatus.NOT_IMPLEMENTED, "no --spec-guard-secret-file here"
    word = vouched(known, headers.get(HEADER, ""), time.time())
    if word is None or word.kind != FALSE_ALARM:
        return HTTPStatus.FORBIDDEN, f"{HEADER}: no valid word"
    status, why = await pass_on(Telling(tellings.number(word.subject)), known)
    return (HTTPStatus.NO_CONTENT, "") if status == HTTPStatus.OK else (status, why)


async def pass_on(telling: Telling, secret: bytes | None) -> tuple[HTTPStatus, str]:
    """Send it to all schedulers of this server."""
    try:
        await asyncio.wait_for(asyncio.wrap_future(_broadcast(telling, secret)), TIMEOUT_S)
    except Exception as error:  # the sender tries again, and logs it if that fails too
        logger.warning("sglang-scaling-fixes: a KV anomaly was not passed on: %r", error)
        return HTTPStatus.SERVICE_UNAVAILABLE, "not passed on to the schedulers"
    return HTTPStatus.OK, "notified"


_under_way: set[asyncio.Task[Any]] = set()


def _broadcast(telling: Telling, secret: bytes | None) -> Any:
    """By stock's broadcast to its schedulers. A future: done when sent."""
    from sglang.srt.entrypoints.http_server import _global_state
    from sglang.srt.managers.io_struct import SetInternalStateReq

    manager = _global_state.tokenizer_manager
    manager_loop = getattr(manager, "event_loop", None)
    if manager_loop is None:
        raise RuntimeError("this server has had no request yet")
    request = SetInternalStateReq(server_args=telling.fields(secret))

    async def send() -> None:
        # A task of its own that is never cancelled: up to 0.5.15, stock's broadcast serves no
        # caller any more once one was cancelled. It sends before it waits for the first time.
        task = asyncio.ensure_future(manager.set_internal_state(request))
        _under_way.add(task)
        task.add_done_callback(_under_way.discard)
        for _ in range(3):
            await asyncio.sleep(0)

    return asyncio.run_coroutine_threadsafe(send(), manager_loop)
