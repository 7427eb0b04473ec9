"""`sglang-scaling-fixes retry-proxy`: its flags, and the server that it runs."""

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
from sglang_scaling_fixes.retry.settings import BOOTSTRAP_PORT, ProxySettings, checked_settings

DESCRIPTION = (
    "An HTTP proxy that retries failed or corrupted requests on another worker. A request fails "
    "when a worker refuses it, drops its connection, is silent, or aborts it because spec-guard "
    "found its KV cache corrupted. It is retried as long as the client has no byte of an answer."
)

CLIENT_KEEP_ALIVE_S = 75
"""How long an idle connection of a client is kept: longer than clients keep theirs."""

_NUMBERS = {
    "port": ("PORT", "port to listen on; 0 chooses a free one"),
    "attempts": ("N", "most workers to ask for one request, the first included"),
    "hold_tokens": ("N", "hold a stream back until it has N tokens, so that it can be retried"),
    "hold_bytes": ("BYTES", "most bytes of one response to hold back"),
    "max_inflight": ("N", "most requests at once; more get 503 with Retry-After"),
    "max_body_bytes": ("BYTES", "largest request body; a larger one gets 413"),
    "max_held_bytes": ("BYTES", "most bytes of all requests and responses in memory"),
    "avoid_seconds": ("SECONDS", "how long a worker is avoided after an anomaly"),
    "connect_timeout": ("SECONDS", "how long connecting to a worker may take"),
    "idle_timeout": (
        "SECONDS",
        "give up a worker that sends no byte for so long, or a client that reads none",
    ),
    "grace": ("SECONDS", "how long running requests may go on after SIGTERM"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--worker",
        action="append",
        default=[],
        metavar="URL",
        help="a server or router; give the flag once for each",
    )
    parser.add_argument(
        "--pd",
        action="append",
        default=[],
        metavar="prefill=URL,decode=URL[,bootstrap-port=N]",
        help="a prefill and a decode server that serve requests together; give the flag once for "
        f"each pair (default bootstrap port {BOOTSTRAP_PORT})",
    )
    parser.add_argument(
        "--host",
        default=ProxySettings.host,
        help="address to listen on (default %(default)s)",
    )
    for name, (metavar, text) in _NUMBERS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=getattr(ProxySettings, name),
            metavar=metavar,
            help=f"{text} (default %(default)s)",
        )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Raises ConfigError."""
    numbers = {name: getattr(args, name) for name in _NUMBERS}
    serve(checked_settings(args.worker, args.pd, host=args.host, **numbers))
    return 0


def serve(chosen: ProxySettings) -> None:
    import uvicorn

    from sglang_scaling_fixes.retry.proxy import RetryProxy

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # Uvicorn raises the signal again at the end. The proxy does not: it has finished
            # the running requests, so that its exit status is 0.
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
        timeout_keep_alive=CLIENT_KEEP_ALIVE_S,
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
            "choose another host or port"
        ) from None
