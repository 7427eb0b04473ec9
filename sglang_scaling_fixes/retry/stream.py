"""One worker's stream on its way to the client. No I/O.

    holding    nothing has been given out, so another worker can still be asked
    flowing    every complete event is given out as it arrives, until one is a failure

A stream flows once every generation of the request has `hold_tokens` tokens or has finished,
or once the stream has ended well. With `hold_tokens` 0 it flows from its first event. The
events' own counts are used. An event without a count counts as one token if it has content.
Under speculative decoding such an event carries several tokens: then more is held than
`hold_tokens`, never less.
"""

from __future__ import annotations

import abc
import re

from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.sse import Cutter, TooLong, data_of, events
from sglang_scaling_fixes.retry.verdict import EventVerdict, judge_event, remarkable

_SEQUENCE = re.compile(rb'"sequence_number":\s*(\d+)')


class EventStream(abc.ABC):
    """One worker's events, cut out of its chunks and judged. Subclasses say what is given out."""

    def __init__(self, family: Family, limit: int, retryable: frozenset[int]) -> None:
        self._family = family
        self._limit = limit
        self._retryable = retryable
        self._cutter = Cutter(limit)
        self.ended = False
        """Whether the API's last event has arrived."""
        self.failure: Failure | None = None
        """Why the attempt has failed. Then nothing more may be fed."""
        self.told: int | None = None
        """The status of an error event of the worker that was passed on."""
        self.progress = 0
        """Grows with every event of the answer, and with no comment."""

    @property
    @abc.abstractmethod
    def held(self) -> int:
        """Bytes in memory."""

    @property
    @abc.abstractmethod
    def next_sequence(self) -> int:
        """The number after that of the last event given out; 0 where events have none."""

    @abc.abstractmethod
    def feed(self, chunk: bytes) -> bytes:
        """What may be given out now: whole events, none of them after a failure."""

    def close(self) -> bytes:
        """The worker has closed the stream before its last event: a failure, and no bytes."""
        self.failure = Failure(Reason.LOST, "the stream ended before its last event")
        return b""

    def _cut(self, chunk: bytes) -> bytes:
        """The events that are complete now; b"" if there is none, or one is too long."""
        try:
            return self._cutter.cut(chunk)
        except TooLong:
            text = f"one event of the stream is larger than {self._limit} bytes"
            self.failure = Failure(Reason.TOO_LARGE, text)
            return b""

    def _judge(self, event: bytes) -> EventVerdict:
        """Take note of what it says. `failure` is set if it fails the attempt."""
        verdict = judge_event(event, self._family, self._retryable)
        if verdict.failure is not None:
            self.failure = verdict.failure
        else:
            self.ended = self.ended or verdict.end
            self.told = self.told or verdict.error
            self.progress += bool(data_of(event))
        return verdict


class Stream(EventStream):
    """`generations`: prompts times samples; each must have its tokens. `limit`: bytes held."""

    def __init__(
        self,
        family: Family,
        hold_tokens: int,
        limit: int,
        generations: int,
        retryable: frozenset[int],
    ) -> None:
        super().__init__(family, limit, retryable)
        self._hold_tokens = hold_tokens
        self._generations = generations
        self._holding = True
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tokens: dict[int, int] = {}
        self._finished: set[int] = set()
        self._last = b""

    @property
    def held(self) -> int:
        return self._held_bytes + self._cutter.held

    @property
    def next_sequence(self) -> int:
        numbers = _SEQUENCE.findall(self._last)
        return int(numbers[-1]) + 1 if numbers else 0

    def feed(self, chunk: bytes) -> bytes:
        block = self._cut(chunk)
        if not block:
            return b""
        if not self._holding and not remarkable(block):
            self._last = block
            self.progress += b"data:" in block
            return block
        return self._sift(block)

    def _sift(self, block: bytes) -> bytes:
        held = self._holding
        out: list[bytes] = []
        for event in events(block):
            verdict = self._judge(event)
            if self.failure is not None:
                break
            self._held.append(event)
            self._held_bytes += len(event)
            if self._holding and not self._enough(event, verdict):
                continue
            self._holding = False
            out += self._held
            self._held, self._held_bytes = [], 0
        if self._holding and self.held > self._limit and self.failure is None:
            self.failure = Failure(
                Reason.TOO_LARGE,
                f"the first {self._hold_tokens} tokens take more than {self._limit} bytes",
            )
        if held and self.failure is not None:
            # One block released the stream and failed it. The client has none of it yet, so
            # another worker can still be asked.
            return b""
        given = b"".join(out)
        self._last = given or self._last
        return given

    def _enough(self, event: bytes, verdict: EventVerdict) -> bool:
        if self.ended:
            return True
        for index, count in verdict.tokens.items():
            self._tokens[index] = max(count, self._tokens.get(index, 0))
        for index in verdict.more:
            self._tokens[index] = self._tokens.get(index, 0) + 1
        self._finished.update(verdict.finished)
        if not self._hold_tokens:
            return bool(data_of(event))  # a comment is not yet an answer
        through = {i for i, count in self._tokens.items() if count >= self._hold_tokens}
        begun = len(self._tokens.keys() | self._finished)
        return len(through | self._finished) >= max(begun, self._generations)
