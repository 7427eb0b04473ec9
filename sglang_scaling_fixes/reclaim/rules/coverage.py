"""Does a success stand for all that was exposed? The rule, without sockets and without SGLang.

Stock prefill reports one success for a room when its last chunk is written. It never
compares what it wrote with what decode waits for. So a success can be short:

    exposed by decode     |<------------ pages, state rows, tokens ------------>|
    a rejected prompt     |w|                                  one placeholder token
    a skipped chunk       |wwwwwwwwwwwwwwww|               |wwwwwwwwwwwwwwwwwwwww|
    a prompt cut short    |wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww|

Decode would read the rest as it finds it: the KV of whoever had the slots before.

The invariant: a success leaves prefill for a decode rank only if

    C1  prefill computed exactly the tokens that decode waits for
    C2  exactly the exposed pages were handed to the transfer, and as many state rows
    C3  every chunk with pages was written to that rank, and the metadata after them

C1 is not implied by C2: pages are whole, so a shorter prompt may fill the last one only
in part. A rank that sends a share of the pages by design (context parallelism) is handed
all of them first, so C2 holds for it too. C3 asks nothing of a rank that sends no KV
by design (see `layout.sends_kv`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Extent(NamedTuple):
    """What the destinations of one decode rank stand for, as decode says it with them."""

    session: str
    """Decode's transfer session: which writes go there."""
    pages: int
    """KV pages that are to be written."""
    states: tuple[int, ...] | None = None
    """State rows to be written, for each kind of state; None: decode did not say."""
    tokens: int | None = None
    """Length of the request's prompt, its cached prefix included; None: decode did not say."""

    @property
    def exact(self) -> bool:
        """Decode said it itself. What is read off a stock decode's message is a lower bound.

        So C3 is not asked of it either: a rank of a decode with context parallelism gets
        no token of a short chunk, and one that rejected the prompt gets no page of most.
        """
        return self.states is not None


@dataclass(slots=True)
class Coverage:
    """What one attempt was given to send, and what became of it."""

    pages: int = 0
    states: tuple[int, ...] = ()
    tokens: int | None = None
    writes: list[str] = field(default_factory=list)
    """Sessions written to for the chunk in hand, once for each write. Appended to by several
    threads; a list's append is one step."""
    unwritten: set[str] = field(default_factory=set)
    """Sessions that a chunk with pages was not written to."""
    unqueued: bool = False
    """A chunk that was handed over was not queued."""
    in_hand: tuple[int, bool] | None = None
    """Pages of the chunk being written, and whether it is the last."""
    looked_at: int = -1
    """So many writes of it there were at the last look: without more there is nothing to see."""

    def offer(self, pages: int, states: tuple[int, ...] | None, tokens: int | None) -> None:
        """Stock hands `pages` more to the transfer, of a prompt of `tokens` tokens.

        `states`: rows for each kind of state, None with every chunk but the last.
        """
        self.pages += pages
        self.tokens = tokens
        if states is not None:
            self.states = states

    def begin(self, pages: int, last: bool, extents: Iterable[Extent]) -> None:
        """A worker takes the next chunk, so it is through with the one before."""
        if self.in_hand is not None:
            self.settle(extents)
            self.writes.clear()
        self.in_hand = pages, last
        self.looked_at = -1

    def settle(self, extents: Iterable[Extent]) -> None:
        """Look at what the chunk in hand has written so far."""
        written = len(self.writes)
        if self.in_hand is None or written == self.looked_at:
            return
        self.looked_at = written
        pages, last = self.in_hand
        if not pages:
            return
        due = 2 if last else 1  # the metadata follows the last pages
        for extent in extents:
            if self.writes.count(extent.session) < due:
                self.unwritten.add(extent.session)

    def missing(self, extent: Extent, sends_kv: Callable[[str], bool]) -> str:
        """What `extent` has that was not sent, empty when nothing is missing. After `settle`."""
        if extent.tokens is not None and self.tokens is not None and extent.tokens != self.tokens:
            return f"prefill computed {self.tokens} tokens, decode waits for {extent.tokens}"
        if self.pages < extent.pages or (extent.exact and self.pages != extent.pages):
            return f"{self.pages} KV pages were sent, decode waits for {extent.pages}"
        if extent.states is not None and _trimmed(self.states) != _trimmed(extent.states):
            return f"{self.states} state rows were sent, decode waits for {extent.states}"
        if self.unqueued and extent.exact:
            return "a chunk of its KV was not queued"
        skipped = extent.exact and extent.session in self.unwritten
        if skipped and extent.pages and sends_kv(extent.session):
            return "a chunk of its KV was skipped"
        return ""


def _trimmed(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Without the kinds at the end that have no rows: one side may not name them."""
    while counts and not counts[-1]:
        counts = counts[:-1]
    return counts
