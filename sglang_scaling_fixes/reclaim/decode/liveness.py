"""Which prefill ranks are gone? Decides when a fence is worth its price, never what is safe.

A rank's ZMQ port is bound by its process for as long as it lives. A host that refuses
a connection there is up, and the process is not. A host that does not answer at all
may be cut off with its NIC alive: that is no evidence, and is left to the operator.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable

from sglang_scaling_fixes.reclaim.rules.types import Rank

LOOK_EVERY_S = 2.0
"""Seconds between two looks at the same ranks."""
_CONNECT_WAIT_S = 1.0


class Liveness:
    """Ranks and prefill instances at the last look, which has a thread of its own, one at a time.

    An instance is looked at by the address of its bootstrap server.
    """

    def __init__(self) -> None:
        self._served: dict[str, bool] = {}
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def look(self, ranks: Iterable[str]) -> None:
        """Look again at `ranks`, unless that was done a moment ago. Does not block.

        What was seen of any other one is forgotten: by the next time another process may serve it.
        """
        ranks = set(ranks)
        for forgotten in self._served.keys() - ranks:
            self._served.pop(forgotten, None)
        now = time.monotonic()
        if not ranks or now < self._next or (self._thread is not None and self._thread.is_alive()):
            return
        self._next = now + LOOK_EVERY_S
        self._thread = threading.Thread(target=self._look, args=(sorted(ranks),), daemon=True)
        self._thread.start()

    def gone(self, rank: Rank) -> bool:
        return self._served.get(rank) is False

    def back(self, instance: str) -> bool:
        """Somebody serves there, though ranks of it are gone."""
        return self._served.get(instance) is True

    def _look(self, ranks: list[str]) -> None:
        for rank in ranks:
            served = serves(rank)
            if served is not None:
                # Who serves the port of a rank that was gone is its successor, and not gone: what
                # the predecessor has left open is told by the successor's incarnation.
                self._served[rank] = served


def serves(rank: str) -> bool | None:
    """Does a process listen at `rank` (`"ip:port"`)?  None: its host gives no answer."""
    host, _, port = rank.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_WAIT_S).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):
        return None
    return True
