"""Which writers are asked next: those of held exposures, rank by rank, the least asked first.

Nothing is searched for. Each rank has one queue for each wait between two questions; within a
queue all wait equally long, so that who was asked first is due first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sglang_scaling_fixes.reclaim.rules.exposure import Exposure, Writer
from sglang_scaling_fixes.reclaim.rules.types import Rank

May = Callable[[Rank, float], bool]
"""Whether a rank may be asked at this time (`Pace.may`)."""


@dataclass(frozen=True)
class SendAbort:
    """Action: send `Abort` for this lease to this rank."""

    rank: Rank
    room: int
    lease: str
    again: bool = False
    """This rank was asked before."""


class Questions:
    """The unproven writers of held exposures.

    `first_wait` and `max_wait` (seconds) bound the backoff between two Aborts to the same
    writer; it doubles each time.
    """

    def __init__(self, first_wait: float, max_wait: float) -> None:
        self._waits = [first_wait]
        """Seconds to the next question after the first, the second and so on; the last stays."""
        while self._waits[-1] < max_wait:
            self._waits.append(min(max_wait, 2 * self._waits[-1]))
        self._queues: dict[Rank, list[OrderedDict[str, Exposure]]] = {}
        """Rank -> exposures by lease: those it was not asked of, was asked of once and so on."""

    def add(self, exposure: Exposure, now: float) -> None:
        """Its owner gave up: its unproven writers are due at once."""
        for writer in exposure.writers.values():
            if writer.proof is None:
                writer.next_abort = now
                queues = self._queues.get(writer.rank) or self._new_rank(writer.rank)
                queues[0][exposure.lease] = exposure

    def drop(self, exposure: Exposure) -> None:
        """Nobody needs to be asked about it any more."""
        for writer in exposure.writers.values():
            if queues := self._queues.get(writer.rank):
                queues[self._place(writer)].pop(exposure.lease, None)
                if not any(queues):
                    del self._queues[writer.rank]

    def due(self, now: float, ranks: Iterable[Rank] | None, may: May) -> list[SendAbort]:
        """Questions to send now. Each counts as asked (`unsent`, if it could not leave).

        To `ranks` only, None: to all that have any. As soon as a rank may not be asked, the
        rest of its questions wait in their order.
        """
        asks: list[SendAbort] = []
        for rank in tuple(self._queues if ranks is None else ranks):
            for queue in self._queues.get(rank, ()):
                if not self._ask(rank, queue, now, may, asks):
                    break
        return asks

    def unsent(self, ask: SendAbort, exposure: Exposure) -> None:
        """It did not leave, and counts for nothing."""
        writer = exposure.writers[ask.rank]
        if self._queue(writer).pop(ask.lease, None) is not None:
            writer.aborts -= 1
            self._queue(writer)[ask.lease] = exposure

    def _ask(
        self,
        rank: Rank,
        queue: OrderedDict[str, Exposure],
        now: float,
        may: May,
        asks: list[SendAbort],
    ) -> bool:
        """Ask of what is due in one queue. False: the rank may not be asked now."""
        for _ in range(len(queue)):
            lease, exposure = next(iter(queue.items()))
            writer = exposure.writers[rank]
            if writer.proof is not None:
                del queue[lease]
                continue
            if writer.next_abort > now:
                return True
            if not may(rank, now):
                return False
            del queue[lease]
            asks.append(SendAbort(rank, exposure.room, lease, again=writer.aborts > 0))
            writer.next_abort = now + self._waits[min(writer.aborts, len(self._waits) - 1)]
            writer.aborts += 1
            self._queue(writer)[lease] = exposure
        return True

    def _queue(self, writer: Writer) -> OrderedDict[str, Exposure]:
        """Where a writer belongs that was asked so often."""
        queues = self._queues.get(writer.rank) or self._new_rank(writer.rank)
        return queues[self._place(writer)]

    def _new_rank(self, rank: Rank) -> list[OrderedDict[str, Exposure]]:
        queues = self._queues[rank] = [OrderedDict() for _ in range(len(self._waits) + 1)]
        return queues

    def _place(self, writer: Writer) -> int:
        return min(writer.aborts, len(self._waits))


def always(rank: Rank, now: float) -> bool:
    """`May` of a rank that is never too silent."""
    del rank, now
    return True
