"""One request of a trace, whatever file it came from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sglang_scaling_fixes.layersplit.planner.models import PAGE, pages


@dataclass(frozen=True)
class Request:
    """`prompt` and `output`: tokens, at least 1 and 0.

    `blocks`: an id for each block of `block` tokens of the prompt, from its start; the last may be
    partly filled. Two requests with the same ids from the start have the same prefix there.

    `arrival`: seconds after the trace's start. None: the request comes `delay` seconds after the
    answer to the request before it in its `session`.

    `line`: where it stands in its file, from 1.
    """

    line: int
    session: Hashable
    arrival: float | None
    delay: float
    prompt: int
    output: int
    blocks: tuple[Hashable, ...]
    block: int

    def fill(self, number: int) -> int:
        """Tokens of the prompt in block `number`, from 0."""
        return min(self.block, self.prompt - number * self.block)

    def room(self, number: int) -> int:
        """Tokens that block `number` takes of a pool: of the last block in whole pages."""
        own = self.fill(number)
        return own if own == self.block else min(self.block, PAGE * pages(own))


Trace = Sequence[Request]
"""In the file's order; of each session, in the order of its turns."""


def reuse(trace: Trace) -> float:
    """Share of all prompt tokens that earlier requests of the file had in the same prefix: the hit
    rate of a pool without end, which computes one request after the other."""
    seen: dict[Hashable, int] = {}
    hits = 0
    for request in trace:
        found, whole = 0, True
        for number, block in enumerate(request.blocks):
            own, had = request.fill(number), seen.get(block, 0)
            if whole:
                found += min(own, had)
                whole = had >= own
            seen[block] = max(own, had)
        hits += min(found, request.prompt - 1)
    return hits / sum(request.prompt for request in trace)
