"""Reads what the observer (and the lossy socket) in the decode server wrote."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.lab.observing.events import Kind

Event = dict[str, Any]


class Observations:
    """The events of one decode server, read as far as they are written. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._offset = 0
        self._requests: dict[str, list[Event]] = {}
        self._pool: Event | None = None
        self._lost: Counter[int] = Counter()

    def of(self, rid: str) -> dict[str, Event]:
        """The latest event of each kind of one request."""
        with self._lock:
            self._read()
            return {event["event"]: event for event in self._requests.get(rid, ())}

    def digests(self, rid: str) -> list[list[int]]:
        """What was in the request's slots each time they were looked at."""
        with self._lock:
            self._read()
            events = self._requests.get(rid, ())
            return [event["digests"] for event in events if event["digests"] is not None]

    def pool(self) -> Event | None:
        """The latest count of free slots: `free_tokens`, `free_metadata`, `time`."""
        with self._lock:
            self._read()
            return self._pool

    def lost(self, room: int) -> int:
        """Messages about this room that the lab has lost."""
        with self._lock:
            self._read()
            return self._lost[room]

    def forget(self, rid: str) -> None:
        """Drop a judged request's events: digests of a long run add up."""
        with self._lock:
            self._requests.pop(rid, None)

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                self._offset += len(line)
                self._take(json.loads(line))

    def _take(self, event: Event) -> None:
        kind = event["event"]
        if kind == Kind.POOL:
            self._pool = event
        elif kind == Kind.LOST:
            self._lost[event["bootstrap_room"]] += 1
        else:
            self._requests.setdefault(event["rid"], []).append(event)
