"""Decode notifies prefill that the KV of a prompt is suspect there too.

    decode scheduler -> POST http://bootstrap host:port/sglang_scaling_fixes/kv_anomaly
        -> prefill's main process -> stock's set_internal_state -> all its schedulers, in one step

The client's retry may reach the prefill server some milliseconds after the abort. So decode posts
before it ends the request, and prefill answers once the message is on its way to the schedulers.
There it is ahead of every later request, because both use the same queues.

The bootstrap server is the one address of a prefill server that decode knows in every release.
A notification holds digests of the prompt's first page, one for each page size, and no tokens. A
stock prefill server answers 404. That is counted and logged, because its cached prompt stays
readable there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from sglang_scaling_fixes.specguard.taint import PAGES, beginnings

logger = logging.getLogger(__name__)

PATH = "/sglang_scaling_fixes/kv_anomaly"
FIELD = "sglang_scaling_fixes_kv_anomaly_"
"""The name of a number in set_internal_state: this and a page size. The number is a digest."""
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
_LARGEST_BODY = 4096


class Notifier:
    """Posts once, quickly. If that fails, a thread tries again.

    `count(outcome)` is called once for each notification: `delivered`, `failed` or `lost`.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._waiting: queue.Queue[tuple[str, bytes]] = queue.Queue(LIMIT)
        self._silent: dict[str, float] = {}
        threading.Thread(target=self._run, name="kv-anomaly-notifier", daemon=True).start()

    def notify(self, host: str, port: int, tokens: Any) -> None:
        """`host` and `port`: prefill's bootstrap server. `tokens`: the suspect prompt."""
        known = beginnings(tokens)
        if not known:
            return
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        url, body = f"http://{host}:{port}{PATH}", json.dumps(known).encode()
        with contextlib.suppress(Exception):  # the thread tries again, and logs what fails
            if time.monotonic() >= self._silent.get(url, 0.0) and _post(url, body, QUICK_S) == 200:
                self._count("delivered")
                return
        try:
            self._waiting.put_nowait((url, body))
        except queue.Full:
            self._count("lost")

    def _run(self) -> None:
        while True:
            url, body = self._waiting.get()
            self._count(self._send(url, body))

    def _send(self, url: str, body: bytes) -> str:
        """The outcome. A server that does not answer must not delay the others for long."""
        if time.monotonic() < self._silent.get(url, 0.0):
            return "failed"
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                status = _post(url, body, TIMEOUT_S)
            except Exception as error:  # also for an answer that is not HTTP, or a bad address
                problem = repr(error)
                continue
            if status == 200:
                self._silent.pop(url, None)
                return "delivered"
            problem = f"it answered {status}"
            if status in (404, 405):
                break  # the plugin does not run there
        self._silent[url] = time.monotonic() + PAUSE_S
        logger.warning(
            "sglang-scaling-fixes: the prefill server was not notified of a KV anomaly (%s: %s); a "
            "retry there may read suspect KV. Arm spec-guard on the prefill server too.",
            url,
            problem,
        )
        return "failed"


def _post(url: str, body: bytes, timeout: float) -> int:
    """The status of the answer. Raises any error of the network or of the other side."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    # The environment's proxies are not used: the address is on the servers' own network.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)


def read(body: bytes) -> dict[int, int]:
    """A notification's digests by page size. ValueError if it is not one."""
    if len(body) > _LARGEST_BODY:
        raise ValueError(f"the body is longer than {_LARGEST_BODY} bytes")
    read = json.loads(body)
    if not isinstance(read, dict) or not read:
        raise ValueError("the body is not an object of digests by page size")
    return {_page(page): _digest(beginning) for page, beginning in read.items()}


def _page(text: str) -> int:
    if text not in map(str, PAGES):
        raise ValueError(f"{text!r} is not a page size")
    return int(text)


def _digest(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a digest of a page of tokens")
    return value


def to_fields(known: Mapping[int, int]) -> dict[str, int]:
    """The digests as fields of set_internal_state."""
    return {f"{FIELD}{page}": beginning for page, beginning in known.items()}


def from_fields(fields: Mapping[str, Any]) -> dict[int, int]:
    """The digests in a set_internal_state request; empty if it is not a notification.

    Every client that may set a server's state may send one, so it is checked like a body.
    """
    found: dict[int, int] = {}
    for name, value in fields.items():
        if name.startswith(FIELD):
            with contextlib.suppress(ValueError):
                found[_page(name.removeprefix(FIELD))] = _digest(value)
    return found


# -- prefill's main process ----------------------------------------------------------------


def add_route(server: Any) -> None:
    """Let a stock bootstrap server accept notifications."""
    from aiohttp import web

    async def accept(request: Any) -> Any:
        try:
            known = read(await request.read())
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        try:
            await asyncio.wait_for(asyncio.wrap_future(_pass_on(known)), TIMEOUT_S)
        except Exception as error:  # the sender tries again, and logs it if that fails too
            logger.warning("sglang-scaling-fixes: a KV anomaly was not passed on: %r", error)
            return web.Response(status=503, text="not passed on to the schedulers\n")
        return web.Response(text="notified\n")

    server.app.router.add_post(PATH, accept)


_under_way: set[asyncio.Task[Any]] = set()


def _pass_on(known: Mapping[int, int]) -> Any:
    """Send to all schedulers of this server, by stock's broadcast. A future: done when sent."""
    from sglang.srt.entrypoints.http_server import _global_state
    from sglang.srt.managers.io_struct import SetInternalStateReq

    manager = _global_state.tokenizer_manager
    manager_loop = getattr(manager, "event_loop", None)
    if manager_loop is None:
        raise RuntimeError("this server has had no request yet")
    request = SetInternalStateReq(server_args=to_fields(known))

    async def send() -> None:
        # A task of its own that is never cancelled: up to 0.5.15, stock's broadcast serves no
        # caller any more once one was cancelled. It sends before it waits for the first time.
        task = asyncio.ensure_future(manager.set_internal_state(request))
        _under_way.add(task)
        task.add_done_callback(_under_way.discard)
        for _ in range(3):
            await asyncio.sleep(0)

    return asyncio.run_coroutine_threadsafe(send(), manager_loop)
