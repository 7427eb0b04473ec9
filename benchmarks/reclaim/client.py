"""One pair's client as a process of its own, so that it can stand still with its servers.

    python -m benchmarks.reclaim.client JOB

JOB is a JSON file, a `Job`. The board is a file of two 64-bit numbers in memory both
sides map: how many requests this client completed so far, and whether it is to stop.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.reclaim.load import End, Ends, Load, Reply, Shape, schedule

_NUMBER = struct.Struct("q")
_COMPLETED, _STOP = 0, _NUMBER.size


@dataclass(frozen=True)
class Job:
    """What a client is to send, and the files it shares with who started it."""

    ends: Ends
    shape: Shape
    first_room: int
    board: str
    replies: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        ends = fields.pop("ends")
        servers = {role: End(**ends[role]) for role in ("prefill", "decode")}
        shape = Shape(**fields.pop("shape"))
        return cls(Ends(**servers, bootstrap_port=ends["bootstrap_port"]), shape, **fields)


class Board:
    """The numbers a client shares; aligned, so that each is read and written whole."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    @classmethod
    @contextlib.contextmanager
    def on(cls, path: Path) -> Iterator[Board]:
        """The board in this file, which is made if it is not there."""
        with path.open("a+b") as file:
            file.truncate(2 * _NUMBER.size)
            with mmap.mmap(file.fileno(), 2 * _NUMBER.size) as memory:
                yield cls(memory)

    @property
    def completed(self) -> int:
        return int(_NUMBER.unpack_from(self._memory, _COMPLETED)[0])

    def add(self) -> None:
        _NUMBER.pack_into(self._memory, _COMPLETED, self.completed + 1)

    @property
    def stopped(self) -> bool:
        return bool(_NUMBER.unpack_from(self._memory, _STOP)[0])

    def stop(self) -> None:
        _NUMBER.pack_into(self._memory, _STOP, 1)


def read_replies(path: Path) -> list[Reply]:
    """What a client that has ended wrote."""
    entries = json.loads(path.read_text())
    return [
        Reply(prompt, None if ids is None else tuple(ids), aborted, error)
        for prompt, ids, aborted, error in entries
    ]


def main(path: str) -> None:
    job = Job.read(Path(path))
    lock = threading.Lock()
    with Board.on(Path(job.board)) as board:

        def ended(reply: Reply) -> bool:
            if reply.ids is not None:
                with lock:
                    board.add()
            return not board.stopped

        load = Load(job.ends, job.shape, job.first_room)
        replies = load.run(schedule(job.shape), ended)
    entries = [(r.prompt, r.ids, r.aborted, r.error) for r in replies]
    Path(job.replies).write_text(json.dumps(entries))


if __name__ == "__main__":
    main(sys.argv[1])
