"""A stream that another worker can go on with. No I/O.

A worker with the fix `resume` says, in comments, which tokens its events are made of. So the
proxy knows at every event how many tokens stand before it, and another worker can go on behind
any of these places:

    events  e1 e2 (7 tokens)  e3 (12)  e4 e5 (19)  e6
            given to the client        kept: the trail
                              ^ `given`            ^ no comment yet: its tokens are not known

The trail is as many tokens as `--trail-tokens` says. It is given out when the stream ends well. If
the stream fails, what is not known is dropped. If its guard calls it an anomaly, what the guard
suspects is dropped, too. The next worker writes it again behind the rest. The client sees one
stream with one name: what differs between two workers' events is rewritten (`names`).
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import orjson

from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.names import Names
from sglang_scaling_fixes.retry.plain import UNREADABLE, Plain, Unfit, plain
from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.sse import data_of, events
from sglang_scaling_fixes.retry.stream import EventStream

FIELD = "sglang_scaling_fixes_resume"
"""In a request's body: the tokens that the answer has already."""
RESUMED_HEADER = "x-sglang-scaling-fixes-resumed"
"""Of an answer: how many of them were taken up. Without it the worker has not got the fix."""
WITHOUT_FIX = "its worker has not got the fix resume"
MOST_UNKNOWN = 16
"""Events in a row behind which nobody could go on, as with tokens that say nothing."""
PATHS = frozenset(
    {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}
)
_IDS = re.compile(rb": " + FIELD.encode() + rb"_ids (\[[\d,]*\])\s*")


@dataclass
class Continuation:
    """What one request's stream has so far, over all of its attempts.

    `ids`: the tokens of all events that are known, given or kept. `given`: how many of them the
    client has. `kept`: the events that it has not, each with how many tokens there are after it.
    `off`: why the stream cannot be gone on with; "" if it can.
    """

    trail: int
    hold: int
    off: str = ""
    ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """How many tokens there were each time that a worker said some."""
    given: int = 0
    kept: deque[tuple[int, bytes]] = field(default_factory=deque)
    names: Names = field(default_factory=Names)
    begun: int = 0
    """How many tokens the running attempt began with."""
    kept_bytes: int = 0
    plain: Plain | None = None
    """How to go on where no worker has the fix; None where they have it."""
    last: bytes = b""
    """The last event that the client has."""

    def fields(self) -> dict[str, Any]:
        """What to add to the body of the next attempt."""
        if self.off:
            return {}
        self.begun = len(self.ids)
        if self.plain is not None:
            last = self.kept[-1][1] if self.kept else self.last
            return self.plain.fields(self.ids, last) if self.ids else {}
        return {FIELD: {"output_ids": self.ids, "report_ids": True, "steps": self.steps}}

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return 8 * (len(self.ids) + len(self.steps)) + self.kept_bytes

    def said(self, ids: list[int]) -> None:
        """A worker says the tokens of its events so far."""
        self.ids += ids
        if len(self.ids) > (self.steps[-1] if self.steps else 0):
            self.steps.append(len(self.ids))

    def keep(self, event: bytes) -> None:
        """An event with which the answer has the tokens of `ids`."""
        self.kept.append((len(self.ids), event))
        self.kept_bytes += len(event)

    def give(self) -> bytes:
        """The oldest that is kept: it is the client's now."""
        self.given, event = self.kept.popleft()
        self.kept_bytes -= len(event)
        if self.plain is not None:
            self.last = event
        return event

    def forget(self) -> None:
        """The answer is begun anew: the client has nothing of it."""
        self.begun = 0
        self.ids.clear()
        self.steps.clear()
        self.kept.clear()
        self.kept_bytes = 0

    def no_more(self, why: str) -> None:
        """It cannot be gone on with from here on, and nothing is kept back for that."""
        self.off = self.off or why
        self.trail = self.hold = 0

    def go_back(self, failure: Failure) -> bool:
        """Drop what the failed attempt may have spoiled. False if the client has some of it."""
        if self.off or (self.plain is not None and self.plain.spent(len(self.ids))):
            return False
        if failure.reason is not Reason.ANOMALY:
            return True
        if self.plain is not None and not self.plain.exact:
            return False
        suspicion = failure.suspicion
        # A rule over the whole attempt suspects what the attempt has written, and not what it
        # was given.
        suspect_from = max(suspicion.suspect_from if suspicion else 0, self.begun)
        if suspect_from < self.given:
            return False
        while self.kept and self.kept[-1][0] > suspect_from:
            self.kept_bytes -= len(self.kept.pop()[1])
        del self.ids[self.kept[-1][0] if self.kept else self.given :]
        while self.steps and self.steps[-1] > len(self.ids):
            self.steps.pop()
        return True


def continuation(request: ClientRequest, trail: int, hold: int) -> Continuation | None:
    """None if nobody asked for a stream. `off` says why this one cannot be gone on with."""
    facts = request.facts
    if facts is None or not facts.stream or facts.resumes:
        return None  # who resumes a stream himself reads its comments himself
    why = ""
    if request.path not in PATHS:
        why = f"{request.path} cannot be resumed"
    elif request.generations > 1 or facts.batch_size is not None:
        why = "it has several answers"
    return Continuation(trail, hold, why)


class NotResumable(Exception):
    """A worker with the fix refuses to say the tokens of this request. It serves it without."""


def refuse_resume(so_far: Continuation | None, status: int, body: bytes) -> None:
    """Raises NotResumable if this is such a refusal, and the client has nothing yet."""
    if so_far is None or so_far.off:
        return
    if so_far.plain is not None and so_far.begun and 400 <= status < 500:
        so_far.forget()
        so_far.no_more("a worker refused to go on with it")
        raise NotResumable
    if status != 400 or FIELD.encode() not in body:
        return
    so_far.forget()
    so_far.no_more("its worker cannot resume a request of this kind")
    raise NotResumable


def go_on_without(so_far: Continuation, request: ClientRequest) -> None:
    """A worker without the fix has begun the answer: `so_far` is gone on with all the same, or is
    `off`."""
    so_far.forget()
    try:
        so_far.plain = plain(request)
    except UNREADABLE as error:
        so_far.no_more(_why(error))


def _why(error: Exception) -> str:
    words = str(error) if isinstance(error, Unfit) else "it says what nobody can read"
    return f"{WITHOUT_FIX}, and {words}"


class TrailStream(EventStream):
    """One attempt's stream. What it has not given out, `so_far` keeps for the next attempt."""

    def __init__(
        self, family: Family, so_far: Continuation, limit: int, retryable: frozenset[int]
    ) -> None:
        super().__init__(family, limit, retryable)
        self._so_far = so_far
        self._unknown: list[bytes] = []
        """Events whose tokens have not been said yet."""
        self._unknown_bytes = 0
        self._continued = bool(so_far.begun)

    @property
    def held(self) -> int:
        return self._cutter.held + self._unknown_bytes + self._so_far.size

    @property
    def next_sequence(self) -> int:
        return self._so_far.names.next_sequence

    def feed(self, chunk: bytes) -> bytes:
        for event in events(self._cut(chunk)):
            self._take(event)
            if self.failure is not None:
                break
        if self.failure is not None:
            return b""
        out = self._released()
        if self.held > self._limit:
            text = f"the trail takes more than {self._limit} bytes"
            self.failure = Failure(Reason.TOO_LARGE, text)
        return out

    def _take(self, event: bytes) -> None:
        if found := _IDS.match(event):
            self._so_far.said(orjson.loads(found[1]))
            self._know()
            return
        self._judge(event)
        if self.failure is None and data_of(event):
            self._unknown.append(event)
            self._unknown_bytes += len(event)

    def _know(self) -> None:
        """The tokens of all events so far are those of `so_far`."""
        for event in self._unknown:
            self._so_far.keep(event)
        self._unknown.clear()
        self._unknown_bytes = 0

    def _released(self) -> bytes:
        """What the trail no longer has to keep."""
        so_far, out = self._so_far, []
        if self.ended:
            self._know()
        elif len(so_far.ids) < so_far.hold:
            return b""
        last = len(so_far.ids) if self.ended else len(so_far.ids) - so_far.trail
        while so_far.kept and so_far.kept[0][0] <= last:
            out.append(so_far.names.rewritten(so_far.give(), continued=self._continued))
        return b"".join(out)


class PlainStream(TrailStream):
    """The same of a worker without the fix: the events themselves say their tokens.

    An answer that turns out not to be one to go on with is given out at once from then on, as if
    nobody had wanted to.
    """

    def feed(self, chunk: bytes) -> bytes:
        out = super().feed(chunk)
        if self.failure is not None and self.failure.reason is Reason.TOO_LARGE:
            self.failure = None
            self._so_far.no_more("its trail is too large")
            self._know()
            return out + self._released()
        return out

    def _take(self, event: bytes) -> None:
        so_far = self._so_far
        verdict = self._judge(event)
        if self.failure is not None or not data_of(event):
            return
        if so_far.begun and verdict.error:
            self._fail("a worker refused to go on with it")
            return
        ids: list[int] | None = None
        if so_far.plain is not None:
            try:
                event, ids = so_far.plain.read(event, so_far.begun)
            except UNREADABLE as error:
                if so_far.begun:
                    self._fail(_why(error))
                    return
                so_far.plain = None
                so_far.no_more(_why(error))
        if event:
            self._unknown.append(event)
            self._unknown_bytes += len(event)
        if ids is not None and not so_far.off:
            so_far.ids = ids
            self._know()
        elif len(self._unknown) > MOST_UNKNOWN:
            so_far.no_more("its events do not say where another worker could go on")
        if so_far.off:
            self._know()

    def _fail(self, why: str) -> None:
        """What the client has cannot be gone on with here, nor anywhere else. Raises NotResumable
        if it has nothing: then the answer is begun anew here."""
        self._so_far.no_more(why)
        if not self._so_far.given:
            self._so_far.forget()
            raise NotResumable
        self.failure = Failure(Reason.ABORTED, why)
