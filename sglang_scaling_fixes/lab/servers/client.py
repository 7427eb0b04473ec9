"""JSON over HTTP to a lab server, one connection per request, from a chosen namespace."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.lab.servers.link import Place


@dataclass(frozen=True)
class Answer:
    """Status 0 stands for no answer; `body` then says why."""

    status: int
    body: Any


class _Connection(http.client.HTTPConnection):
    def __init__(self, client: Place, host: str, port: int, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._client = client

    def connect(self) -> None:
        with self._client.entered():
            self.sock = socket.create_connection((self.host, self.port), self.timeout)


class Call:
    """One request; `run` waits for the answer, `hang_up` from another thread ends it."""

    def __init__(
        self,
        client: Place,
        host: str,
        port: int,
        path: str,
        *,
        payload: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._where = (client, host, port)
        self._path = path
        self._headers = dict(headers or {})
        self._body = None if payload is None else json.dumps(payload)
        self._connection: _Connection | None = None

    def run(self, timeout_s: float = 10.0) -> Answer:
        """GET, or POST if there is a payload. Never raises for a server's sake."""
        connection = self._connection = _Connection(*self._where, timeout_s)
        headers = {"Connection": "close", "Content-Type": "application/json", **self._headers}
        try:
            method = "GET" if self._body is None else "POST"
            connection.request(method, self._path, body=self._body, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, _decode(response.read()))
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def hang_up(self) -> None:
        """As a client that goes away: the server sees the connection close."""
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)


def call(
    client: Place,
    host: str,
    port: int,
    path: str,
    *,
    payload: object = None,
    timeout_s: float = 10.0,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """GET `path`, or POST it with a JSON payload.  Never raises for a server's sake."""
    return Call(client, host, port, path, payload=payload, headers=headers).run(timeout_s)


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
