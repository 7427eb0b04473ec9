"""Why an attempt failed, and the error that the client gets.

Every error of the proxy has the same fields: `type` (see TYPES), `code`, `message` and
`retryable`. They stand in the envelope of the API that the client used.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.servers import Role

DONE = b"data: [DONE]\n\n"


class Reason(enum.StrEnum):
    """The label in logs and metrics."""

    ANOMALY = "anomaly"
    """The worker's spec-guard aborted the generation."""
    UNAVAILABLE = "unavailable"
    """The worker answered 502, 503 or another status to retry, as such or within a stream."""
    ABORTED = "aborted"
    """The worker aborted the generation and gave no reason that is the client's."""
    REFUSED = "refused"
    """The worker could not be connected to."""
    LOST = "lost"
    """The connection ended before the answer did."""
    TIMEOUT = "timeout"
    """The worker sent nothing of the answer for too long."""
    UNREADABLE = "unreadable"
    """The answer is not HTTP, or is encoded so that the proxy cannot read it."""
    TOO_LARGE = "too_large"
    """More had to be held back than the limit of one response."""
    NO_MEMORY = "no_memory"
    """More had to be held back than the limit of all requests together."""
    OWN_LIMIT = "own_limit"
    """The proxy itself has no socket left for a connection to a worker."""


TYPES = {
    Reason.ANOMALY: "kv_anomaly",
    Reason.UNAVAILABLE: "worker_unavailable",
    Reason.ABORTED: "worker_aborted",
    Reason.REFUSED: "worker_lost",
    Reason.LOST: "worker_lost",
    Reason.TIMEOUT: "worker_timeout",
    Reason.UNREADABLE: "worker_unreadable",
    Reason.TOO_LARGE: "held_too_large",
    Reason.NO_MEMORY: "overloaded",
    Reason.OWN_LIMIT: "overloaded",
}
_OURS = (Reason.TOO_LARGE, Reason.NO_MEMORY, Reason.OWN_LIMIT)
"""What no other worker can help with."""
_SUSPICION = re.compile(r"\[rule=(\w+) suspicion=([A-Za-z0-9_-]{1,64}) suspect_from=(\d{1,9})\]")
"""How the guard ends the message of an abort."""


@dataclass(frozen=True)
class Suspicion:
    """What the guard says of an abort: its rule, the suspicion's name, and from where on the
    output is suspect, in tokens."""

    rule: str
    name: str
    suspect_from: int


@dataclass
class Failure(Exception):
    """An attempt that failed.

    `message` is for the client. `detail` is for the log only: it may name addresses.
    `retry_after`: seconds, if the worker sent `Retry-After`. `half`: which half of a pair failed,
    if that is certain. `status`: what the worker answered, if it did. `final`: the client gains
    nothing if it tries again at once.
    """

    reason: Reason
    message: str
    retry_after: int | None = None
    detail: str = ""
    half: Role | None = None
    status: int | None = None
    final: bool = False

    @property
    def type(self) -> str:
        return TYPES[self.reason]

    @property
    def elsewhere(self) -> bool:
        """Whether another worker may succeed."""
        return self.reason not in _OURS

    @property
    def retryable(self) -> bool:
        """Whether the client may succeed later."""
        return not (
            self.reason is Reason.TOO_LARGE or (self.reason is Reason.ANOMALY and self.final)
        )

    @property
    def broke(self) -> bool:
        """Whether the worker itself is in doubt, not only this answer."""
        return self.reason is Reason.REFUSED or self.lost

    @property
    def lost(self) -> bool:
        """Whether the worker had the request, and no answer came of it."""
        return self.reason in (Reason.LOST, Reason.TIMEOUT, Reason.UNREADABLE)

    @property
    def suspicion(self) -> Suspicion | None:
        """Of an anomaly, if the guard says it."""
        found = _SUSPICION.search(self.message) if self.reason is Reason.ANOMALY else None
        return Suspicion(found[1], found[2], int(found[3])) if found else None


def error_body(family: Family, kind: str, message: str, code: int, retryable: bool) -> bytes:
    """The JSON body of an answer with status `code`. `kind`: the error's `type`."""
    return json.dumps(_envelope(family, kind, message, code, retryable)).encode()


def error_event(family: Family, failure: Failure, sequence: int) -> bytes:
    """The end of a stream whose client already has bytes: one error, then the terminator.

    `sequence`: this event's number, for the API that numbers its events.
    """
    if family is Family.RESPONSES:
        event: dict[str, Any] = {
            "type": "error",
            "code": failure.type,
            "message": failure.message,
            "param": None,
            "sequence_number": sequence,
            "retryable": failure.retryable,
        }
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
    data = error_body(family, failure.type, failure.message, 503, failure.retryable)
    if family is Family.MESSAGES:
        return b"event: error\ndata: " + data + b"\n\n"
    return b"data: " + data + b"\n\n" + DONE


def _envelope(
    family: Family, kind: str, message: str, code: int, retryable: bool
) -> dict[str, Any]:
    if family is Family.MESSAGES:
        error: dict[str, Any] = {"type": kind, "message": message, "retryable": retryable}
        return {"type": "error", "error": error}
    error = {"object": "error", "type": kind, "message": message, "code": code, "param": None}
    return {"error": {**error, "retryable": retryable}}
