"""`sglang-scaling-fixes retry-proxy`: its flags, and the server it runs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.retry.settings import Settings, settings

CLIENT_KEEP_ALIVE = 75
"""Seconds an idle connection of a client is kept: longer than clients keep theirs."""

_NUMBERS = {
    "port": ("PORT", "to listen on; 0: any that is free"),
    "attempts": ("N", "workers that are asked at most, the first included"),
    "hold_tokens": ("N", "hold a stream's first N tokens back until they are all there"),
    "hold_bytes": ("BYTES", "of one response held back at most"),
    "max_inflight": ("N", "requests at once; past it 503 with Retry-After"),
    "max_body_bytes": ("BYTES", "of one request; past it 413"),
    "max_held_bytes": ("BYTES", "of all requests and responses together"),
    "avoid_seconds": ("SECONDS", "a worker is avoided after an anomaly"),
    "connect_timeout": ("SECONDS", "until a worker counts as not reachable"),
    "idle_timeout": ("SECONDS", "without a byte until a worker, or a client, counts as lost"),
    "grace": ("SECONDS", "requests may take to end after SIGTERM"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--worker", action="append", default=[], metavar="URL", help="a server or router to ask"
    )
    parser.add_argument(
        "--pd",
        action="append",
        default=[],
        metavar="prefill=URL,decode=URL[,bootstrap-port=N]",
        help="a prefill and a decode that serve requests together",
    )
    parser.add_argument("--host", default=Settings.host, help="to listen on (default %(default)s)")
    for name, (metavar, text) in _NUMBERS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=getattr(Settings, name),
            metavar=metavar,
            help=f"{text} (default %(default)s)",
        )


def run(args: argparse.Namespace) -> int:
    """Until SIGTERM or SIGINT. Raises ConfigError."""
    numbers = {name: getattr(args, name) for name in _NUMBERS}
    serve(settings(args.worker, args.pd, host=args.host, **numbers))
    return 0


def serve(chosen: Settings) -> None:
    import uvicorn

    from sglang_scaling_fixes.retry.proxy import RetryProxy

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # As uvicorn does it, but for raising the signal again at the end: having
            # finished what was running, the proxy ends well.
            kinds = (signal.SIGINT, signal.SIGTERM)
            before: dict[int, Any] = {s: signal.signal(s, self.handle_exit) for s in kinds}
            try:
                yield
            finally:
                for kind, handler in before.items():
                    signal.signal(kind, handler)

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    listener = _listen(chosen.host, chosen.port)
    config = uvicorn.Config(
        RetryProxy(chosen),
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=CLIENT_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(chosen.grace)),
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"retry-proxy: http://{shown}:{port}, {len(chosen.targets)} workers", file=sys.stderr)
    sys.stderr.flush()
    Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); "
            "choose another"
        ) from None
