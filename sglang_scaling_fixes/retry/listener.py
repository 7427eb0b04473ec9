"""Where the proxy listens: its sockets, its share of open files, its HTTP protocol.

The limits are the same whatever else is installed: uvicorn would choose another parser, with
other limits, where it finds one.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang_scaling_fixes.errors import ConfigError

RESERVED_FILES = 128
"""Open files for all that is no request: probes, /health, /metrics, idle clients."""
FILES_PER_REQUEST = 3
"""The client's connection, and one to each half of a pair."""
MOST_IN_FLIGHT = 16_384
"""What the proxy takes of itself where the limit of open files is high or none."""
WAITING_BYTES = 1 << 16
"""Of further requests on a connection whose first one is not answered yet."""
HEADER_S = 30.0
"""How long a connection may take for a request's headers, from its first moment on."""


def listen(flag: str, host: str, port: int) -> socket.socket:
    """Listens on IPv4 as well if the host is `::`. Raises ConfigError."""
    wants_both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=2048, dualstack_ipv6=wants_both
        )
    except OSError as error:
        raise ConfigError(
            f"--host {host} {flag} {port}: cannot listen there ({error.strerror or error}); "
            "choose another host or port"
        ) from None


def raise_file_limit() -> int:
    """Raise the soft limit of open files as far as may be; the limit that is then in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 31
    if hard == resource.RLIM_INFINITY or hard > soft:
        wanted = hard
        if hard == resource.RLIM_INFINITY:
            wanted = max(soft, FILES_PER_REQUEST * MOST_IN_FLIGHT + RESERVED_FILES)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass  # what is in force is used
    return soft


def in_flight_limit(asked: int, files: int) -> int:
    """How many requests fit into so many open files; `asked` if it is given and fits.

    Raises ConfigError if it does not.
    """
    fits = max(1, (files - RESERVED_FILES) // FILES_PER_REQUEST)
    if not asked:
        return min(fits, MOST_IN_FLIGHT)
    if asked > fits:
        raise ConfigError(
            f"--max-inflight {asked}: the limit of {files} open files is enough for {fits}; raise "
            f"it to {asked * FILES_PER_REQUEST + RESERVED_FILES} (ulimit -n), or give a lower "
            "number"
        )
    return asked


def client_protocol(idle_s: float) -> type[ClientProtocol]:
    """The protocol whose connections end `idle_s` seconds after their client stopped reading."""

    class Protocol(ClientProtocol):
        idle_ms = max(1, round(idle_s * 1000))

    return Protocol


class ClientProtocol(H11Protocol):
    """HTTP/1.1 of one client. A connection that sends no request in time is closed, and so is one
    that takes nothing of what was written: closing it by itself waits for that for ever."""

    idle_ms = 600_000

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self.idle_ms)
            # asyncio leaves it out for listeners that were made without naming the protocol. Then
            # a body waits 40 ms for the acknowledgement of its headers.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expected()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # The beginning of one more request: its headers have a limit, too.
        if self._header_timer is None and self._between_requests():
            self._expect_headers()

    def handle_events(self) -> None:
        super().handle_events()
        if not self._between_requests():
            self._expected()
            self._hear_it_leave()

    def _hear_it_leave(self) -> None:
        """Uvicorn reads no more once a next request is here, and misses that its client left."""
        if not self.flow.read_paused or self.cycle.more_body:
            return
        if len(self.conn.trailing_data[0]) <= WAITING_BYTES:
            self.flow.resume_reading()
        else:
            self.transport.close()

    _header_timer: asyncio.TimerHandle | None = None

    def _between_requests(self) -> bool:
        """Whether no request's headers are complete and unanswered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_S, self._too_late)

    def _expected(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_late(self) -> None:
        self._header_timer = None
        if self._between_requests() and not self.transport.is_closing():
            self.transport.close()
