"""One worker's stream on its way to the client. No I/O.

    holding    nothing has been given out; a failure can still be made good elsewhere
    flowing    every complete event goes out as it comes, until one is a failure

It flows once every generation of the request has `hold_tokens` tokens or has finished,
or the stream has ended well. With 0 the first event is enough. Tokens are counted as
the events say; where they do not, an event with content counts one. Under speculative
decoding such an event carries several, so that more is held than was asked for, never
less.
"""

from __future__ import annotations

import re

from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.sse import Cutter, TooLong, data_of, events
from sglang_scaling_fixes.retry.verdict import RETRYABLE, Verdict, judge_event, remarkable

_SEQUENCE = re.compile(rb'"sequence_number":\s*(\d+)')


class Stream:
    """`generations`: prompts times samples, all of which must be held back long enough."""

    def __init__(
        self,
        family: Family,
        hold_tokens: int,
        limit: int,
        generations: int = 1,
        retryable: frozenset[int] = RETRYABLE,
    ) -> None:
        self._family = family
        self._hold_tokens = hold_tokens
        self._limit = limit
        self._generations = generations
        self._retryable = retryable
        self._cutter = Cutter(limit)
        self._holding = True
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tokens: dict[int, int] = {}
        self._finished: set[int] = set()
        self._last = b""
        self.ended = False
        """Whether the terminator has been seen."""
        self.failure: Failure | None = None
        """Why the attempt is over. Nothing may be fed after it."""

    @property
    def held(self) -> int:
        """Bytes this keeps in memory."""
        return self._held_bytes + self._cutter.held

    @property
    def next_sequence(self) -> int:
        """The number of the event after the last one given out, in APIs that number them."""
        numbers = _SEQUENCE.findall(self._last)
        return int(numbers[-1]) + 1 if numbers else 0

    def feed(self, chunk: bytes) -> bytes:
        """What may be given out now: whole events, all of them before any failure."""
        try:
            block = self._cutter.cut(chunk)
        except TooLong:
            self.failure = Failure(
                Reason.TOO_LARGE, f"one event of the stream is larger than {self._limit} bytes"
            )
            return b""
        if not block:
            return b""
        if not self._holding and not remarkable(block):
            self._last = block
            return block
        return self._sift(block)

    def close(self) -> bytes:
        """The worker sent no last event and has no more to send: a failure, and nothing to give."""
        self.failure = Failure(Reason.LOST, "the stream ended before its last event")
        return b""

    def _sift(self, block: bytes) -> bytes:
        held = self._holding
        out: list[bytes] = []
        for event in events(block):
            verdict = judge_event(event, self._family, self._retryable)
            if verdict.failure is not None:
                self.failure = verdict.failure
                break
            self.ended = self.ended or verdict.end
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
            # One block brought the last token to be held and the bad news: nobody has it yet.
            return b""
        given = b"".join(out)
        self._last = given or self._last
        return given

    def _enough(self, event: bytes, verdict: Verdict) -> bool:
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
