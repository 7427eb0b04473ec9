"""The few lines that touch ZMQ: addresses, identities, and sends that never block."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
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
    """PUSH sockets to decode ranks, made on first use, shared by all threads.

    Addresses come from the network: one that cannot be connected to is not, and of
    more than `limit` the one unused longest is closed (its decode rank asks again).
    A ZMQ context has 1023 in all.
    """

    def __init__(self, limit: int = 512) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        self._sockets: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()

    def send(self, to: str, frame: bytes) -> bool:
        """One single-frame message to `to` (`"tcp://ip:port"`); never blocks, never raises."""
        with self._lock:
            socket = self._sockets.get(to) or self._connect(to)
            if socket is None:
                return False
            self._sockets.move_to_end(to)
            return send_now(socket, [frame])

    def _connect(self, to: str) -> zmq.Socket[bytes] | None:
        try:
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        except zmq.ZMQError as error:
            logger.warning("safe-reclaim: no socket for %s: %s", to, error)
            return None
        try:
            socket.setsockopt(zmq.LINGER, 0)
            if "[" in to:
                socket.setsockopt(zmq.IPV6, 1)
            socket.connect(to)
        except zmq.ZMQError as error:
            logger.warning("safe-reclaim: cannot connect to %s: %s", to, error)
            socket.close()
            return None
        self._sockets[to] = socket
        if len(self._sockets) > self._limit:
            self._sockets.popitem(last=False)[1].close()
        return socket
