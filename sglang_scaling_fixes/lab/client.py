"""JSON over HTTP to a lab server, one connection per request, from a chosen namespace."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.lab.link import Place


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


def call(
    client: Place,
    host: str,
    port: int,
    path: str,
    *,
    payload: object = None,
    timeout_s: float = 10.0,
) -> Answer:
    """GET `path`, or POST it with a JSON payload.  Never raises for a server's sake."""
    connection = _Connection(client, host, port, timeout_s)
    headers = {"Connection": "close", "Content-Type": "application/json"}
    try:
        if payload is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, body=json.dumps(payload), headers=headers)
        response = connection.getresponse()
        return Answer(response.status, _decode(response.read()))
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
