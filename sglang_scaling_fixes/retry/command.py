"""`sglang-scaling-fixes retry-proxy`: its flags, and the server that it runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.retry.servers import BOOTSTRAP_PORT, Server
from sglang_scaling_fixes.retry.settings import (
    NUMBERS,
    RETRY_STATUS,
    ProxySettings,
    all_servers,
    checked_settings,
)

if TYPE_CHECKING:
    import uvicorn

DESCRIPTION = (
    "An HTTP proxy that retries failed or corrupted requests on another worker. A request fails "
    "when a worker refuses it, drops its connection, is silent, or aborts it because spec-guard "
    "found its KV cache corrupted. It is retried as long as the client has no byte of an answer."
)

CLIENT_KEEP_ALIVE_S = 75
"""How long an idle connection of a client is kept: longer than clients keep theirs."""
HEADER_BYTES = 1 << 16
"""The longest headers of a request."""

_LISTS = {
    "worker": ("URL", "a server or router; give the flag once for each"),
    "pd": (
        "prefill=URL,decode=URL[,bootstrap-port=N]",
        "a prefill and a decode server that serve requests together; give the flag once for each "
        f"pair (default bootstrap port {BOOTSTRAP_PORT})",
    ),
    "prefill": (
        "URL[,bootstrap-port=N]",
        "a prefill server that serves requests with any --decode; give the flag once for each",
    ),
    "decode": ("URL", "a decode server that serves with any --prefill"),
}
_TEXTS = {
    "host": ("HOST", "address to listen on; :: is IPv4 and IPv6 (default %(default)s)"),
    "workers_file": ("FILE", "more servers, a line each, as in: worker URL; read again on SIGHUP"),
    "secret_file": (
        "FILE",
        "the secret of the workers' --spec-guard-secret-file: what two guards call an anomaly is "
        "then answered unguarded by a third attempt",
    ),
    "retry_status": (
        "CODES",
        "statuses of a worker that are retried "
        f"(default {','.join(map(str, sorted(RETRY_STATUS)))})",
    ),
}
_NUMBERS = {
    "port": ("PORT", "port to listen on; 0 chooses a free one"),
    "admin_port": ("PORT", "another port for /metrics, and a /health that names the workers"),
    "attempts": ("N", "most workers to ask for one request, the first included"),
    "hold_tokens": ("N", "hold a stream back until it has N tokens, so that it can be retried"),
    "migrations": (
        "N",
        "continue a stream that breaks on up to N other workers; they need the fix resume",
    ),
    "trail_tokens": (
        "N",
        "stay N tokens behind all the time, so that what an anomaly spoiled can be written again",
    ),
    "hold_bytes": ("BYTES", "most bytes of one response to hold back"),
    "max_inflight": (
        "N",
        "most requests at once; more get 503 with Retry-After; 0: as many as the limit of open "
        "files allows",
    ),
    "max_body_bytes": ("BYTES", "largest request body; a larger one gets 413"),
    "max_held_bytes": ("BYTES", "most bytes of all requests and responses in memory"),
    "avoid_seconds": ("SECONDS", "how long a worker is avoided after an anomaly"),
    "refuse_seconds": ("SECONDS", "how long a request that broke two workers is refused"),
    "probe_interval": ("SECONDS", "between two probes of a worker"),
    "probe_timeout": ("SECONDS", "how long a probe may take; stock's own limit is 20 s"),
    "connect_timeout": ("SECONDS", "how long connecting to a worker may take"),
    "idle_timeout": (
        "SECONDS",
        "give up a worker that sends no byte for so long, or a client that reads none",
    ),
    "first_token_timeout": (
        "SECONDS",
        "give up a stream without a first event so long after it was asked for",
    ),
    "token_timeout": ("SECONDS", "give up a stream without a next event; comments are none"),
    "drain_delay": ("SECONDS", "after SIGTERM, say 503 on /health for so long, and go on serving"),
    "grace": ("SECONDS", "how long running requests may then go on"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    for name, (metavar, text) in _LISTS.items():
        parser.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=text)
    for name, (metavar, text) in _TEXTS.items():
        default = ProxySettings.host if name == "host" else None
        parser.add_argument(_flag(name), default=default, metavar=metavar, help=text)
    for name, (metavar, text) in _NUMBERS.items():
        default = getattr(ProxySettings, name)
        shown = "" if default is None else " (default %(default)s)"
        parser.add_argument(_flag(name), default=default, metavar=metavar, help=text + shown)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Raises ConfigError."""
    given = {name: getattr(args, name) for name in _LISTS}
    workers_file = args.workers_file or ""
    settings = checked_settings(
        given,
        workers_file=workers_file,
        secret_file=args.secret_file or "",
        retry_status=args.retry_status,
        host=args.host,
        **{name: getattr(args, name) for name in NUMBERS},
    )
    serve(settings, lambda: all_servers(given, workers_file))
    return 0


def serve(settings: ProxySettings, read: Callable[[], list[Server]]) -> None:
    """`read` gives the list of servers again. Raises ConfigError."""
    try:
        from sglang_scaling_fixes.retry import listener
        from sglang_scaling_fixes.retry.proxy import RetryProxy
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"retry-proxy needs {error.name}, which is not installed; "
            "run: pip install 'sglang-scaling-fixes[proxy]'"
        ) from None
    files = listener.raise_file_limit()
    limit = listener.in_flight_limit(settings.max_inflight, files)
    settings = replace(settings, max_inflight=limit)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    app = RetryProxy(settings, read)
    sockets = [listener.listen("--port", settings.host, settings.port)]
    if settings.admin_port is not None:
        sockets.append(listener.listen("--admin-port", settings.host, settings.admin_port))
    names = [_name(one) for one in sockets]
    admin = f", health and metrics at {names[1]}" if len(names) > 1 else ""
    print(
        f"retry-proxy: {names[0]}, {len(settings.servers)} workers{admin}",
        file=sys.stderr,
        flush=True,
    )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_Serving(app, settings).run(sockets))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """SGLang brings uvloop, which takes a third less CPU for an event."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def _name(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Serving:
    """The proxy's server, and one for health and metrics if that is asked for."""

    def __init__(self, app: Any, settings: ProxySettings) -> None:
        self._app = app
        self._settings = settings
        self._stopping: asyncio.Task[None] | None = None
        self._reloading: set[asyncio.Task[None]] = set()

    async def run(self, sockets: list[socket.socket]) -> None:
        """Until SIGTERM or SIGINT, and the end of the running requests."""
        servers = [self._server(self._app, "on")]
        if len(sockets) > 1:
            servers.append(self._server(self._app.admin, "off"))
        with self._signals(servers):
            await asyncio.gather(
                *(s.serve(sockets=[one]) for s, one in zip(servers, sockets, strict=True))
            )

    def _server(self, app: Any, lifespan: Any) -> uvicorn.Server:
        import uvicorn

        from sglang_scaling_fixes.retry.listener import client_protocol

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                """Signals are the whole proxy's. So the exit status after one is 0."""
                yield

        return Server(
            uvicorn.Config(
                app,
                interface="asgi3",
                http=client_protocol(self._settings.idle_timeout),
                h11_max_incomplete_event_size=HEADER_BYTES,
                lifespan=lifespan,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=CLIENT_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(self._settings.grace)),
            )
        )

    @contextlib.contextmanager
    def _signals(self, servers: list[uvicorn.Server]) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if self._stopping is None:
                self._stopping = asyncio.create_task(self._stop(servers))
            else:  # asked for twice: at once
                for server in servers:
                    server.should_exit = server.force_exit = True

        def reload() -> None:
            task = asyncio.create_task(self._app.reload())
            self._reloading.add(task)
            task.add_done_callback(self._reloading.discard)

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
        for kind, handler in handlers.items():
            loop.add_signal_handler(kind, handler)
        try:
            yield
        finally:
            for kind in handlers:
                loop.remove_signal_handler(kind)

    async def _stop(self, servers: list[uvicorn.Server]) -> None:
        """First say so, and serve on: balancers need time to send requests elsewhere."""
        self._app.draining = True
        await asyncio.sleep(self._settings.drain_delay)
        for server in servers:
            server.should_exit = True
