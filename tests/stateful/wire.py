"""What lies between decode and prefill: messages in order, and writes that land when they land."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from sglang_scaling_fixes.reclaim import messages


class Harm(AssertionError):
    """A slot was reachable that must not be, or a request was given KV that is not its own."""


class Silent(Exception):
    """Nothing has come: a real socket or queue would block here."""


@dataclass(eq=False)
class Request:
    """One attempt of a request at a room, as its owner on decode and nobody else knows it."""

    number: int
    room: int
    pages: int
    slots: Any = None
    aux: int = -1
    receiver: Any = None
    state: str = "open"
    """Then "given up", or "used" and "done"."""

    @property
    def tokens(self) -> int:
        """Length of the prompt. No placeholder is as long."""
        return 10 * self.pages


@dataclass(eq=False)
class Write:
    """Bytes that an engine was given: they may still reach decode's memory."""

    rank: int
    session: str
    request: Request
    """Whose destinations these are."""
    pages: list[tuple[int, int]]
    """(slot, page of the request); empty where the metadata are written."""
    whole: bool
    """It carries KV of the prompt, not of a placeholder."""


@dataclass(eq=False)
class Link:
    """One connection. What is sent on it arrives in order or not at all."""

    target: Any
    """Called for the process that hears what arrives."""
    queue: deque[list[bytes]] = field(default_factory=deque)

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> None:
        del flags
        self.queue.append(list(frames))

    def deliver(self) -> None:
        self.target().hear(self.queue.popleft())


class Incoming:
    """A bound socket, read by one thread."""

    def __init__(self) -> None:
        self.queue: deque[list[bytes]] = deque()

    def recv_multipart(self) -> list[bytes]:
        self.poll(0)
        return self.queue.popleft()

    def poll(self, timeout: int) -> int:
        del timeout
        if not self.queue:
            raise Silent
        return len(self.queue)


@dataclass(eq=False)
class Network:
    """All connections, and all writes that may still land."""

    links: list[Link] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)

    def connect(self, target: Any) -> Link:
        link = Link(target)
        self.links.append(link)
        return link

    @property
    def busy(self) -> list[Link]:
        return [link for link in self.links if link.queue]


def greets(frames: list[bytes]) -> bool:
    """Without this message decode may not learn who serves a rank."""
    return isinstance(messages.strip_trailer(frames)[1], messages.Hello | messages.HelloAck)
