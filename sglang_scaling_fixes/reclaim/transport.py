"""The few lines that touch ZMQ: addresses, identities, and sends that never block."""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any

import zmq

logger = logging.getLogger(__name__)


def endpoint(ip: str, port: int | str) -> str:
    """`"tcp://ip:port"`, with brackets for IPv6."""
    return f"tcp://[{ip}]:{port}" if ":" in str(ip) else f"tcp://{ip}:{port}"


def new_incarnation() -> str:
    """An identity no other process, and no later life of this one, will have (64 random bits)."""
    return secrets.token_hex(8)


def send_now(socket: Any, frames: list[bytes]) -> bool:
    """Send without blocking. False when the peer's queue is full or gone: ask again later."""
    try:
        socket.send_multipart(frames, flags=zmq.NOBLOCK)
    except zmq.ZMQError as error:
        logger.debug("safe-reclaim: message not sent: %s", error)
        return False
    return True


class ReplySockets:
    """PUSH sockets to decode ranks, made on first use, shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def send(self, to: str, frame: bytes) -> bool:
        """One single-frame message to `to` (`"tcp://ip:port"`); never blocks."""
        with self._lock:
            socket = self._sockets.get(to)
            if socket is None:
                socket = zmq.Context.instance().socket(zmq.PUSH)
                socket.setsockopt(zmq.LINGER, 0)
                if "[" in to:
                    socket.setsockopt(zmq.IPV6, 1)
                socket.connect(to)
                self._sockets[to] = socket
            return send_now(socket, [frame])
