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
    """Ranks that were gone at the last look; looks have a thread of their own, one at a time."""

    def __init__(self) -> None:
        self._gone: set[Rank] = set()
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def look(self, ranks: Iterable[Rank]) -> None:
        """Look again at `ranks`, unless that was done a moment ago. Does not block.

        What was seen of any other rank is forgotten: by the next time another process may serve it.
        """
        ranks = set(ranks)
        self._gone &= ranks
        now = time.monotonic()
        if not ranks or now < self._next or (self._thread is not None and self._thread.is_alive()):
            return
        self._next = now + LOOK_EVERY_S
        self._thread = threading.Thread(target=self._look, args=(sorted(ranks),), daemon=True)
        self._thread.start()

    def gone(self, rank: Rank) -> bool:
        return rank in self._gone

    def _look(self, ranks: list[Rank]) -> None:
        for rank in ranks:
            served = serves(rank)
            if served is None:
                continue
            # Who serves the port of a rank that was gone is its successor, and not gone: what
            # the predecessor has left open is told by the successor's incarnation.
            if served:
                self._gone.discard(rank)
            else:
                self._gone.add(rank)


def serves(rank: Rank) -> bool | None:
    """Does a process listen at `rank` (`"ip:port"`)?  None: its host gives no answer."""
    host, _, port = rank.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_WAIT_S).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):
        return None
    return True
