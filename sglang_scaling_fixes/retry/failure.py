"""Why an attempt failed, and the error that the client gets.

Every error of the proxy has the same fields: `type` (see TYPES), `code`, `message` and
`retryable`. They stand in the envelope of the API that the client used.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.retry.routes import Family

DONE = b"data: [DONE]\n\n"


class Reason(enum.StrEnum):
    """The label in logs and metrics."""

    ANOMALY = "anomaly"
    """The worker's spec-guard aborted the generation."""
    UNAVAILABLE = "unavailable"
    """The worker answered 502, 503 or 504, as a status or within a stream."""
    REFUSED = "refused"
    """The worker could not be connected to."""
    LOST = "lost"
    """The connection ended before the answer did."""
    TIMEOUT = "timeout"
    """The worker sent no byte for too long."""
    UNREADABLE = "unreadable"
    """The answer is not HTTP, or is encoded so that the proxy cannot read it."""
    TOO_LARGE = "too_large"
    """More had to be held back than the limit of one response."""
    NO_MEMORY = "no_memory"
    """More had to be held back than the limit of all requests together."""


TYPES = {
    Reason.ANOMALY: "kv_anomaly",
    Reason.UNAVAILABLE: "worker_unavailable",
    Reason.REFUSED: "worker_lost",
    Reason.LOST: "worker_lost",
    Reason.TIMEOUT: "worker_timeout",
    Reason.UNREADABLE: "worker_unreadable",
    Reason.TOO_LARGE: "held_too_large",
    Reason.NO_MEMORY: "overloaded",
}


@dataclass
class Failure(Exception):
    """An attempt that failed.

    `message` is for the client. `detail` is for the log only: it may name addresses.
    `retry_after`: seconds, if the worker sent `Retry-After`.
    """

    reason: Reason
    message: str
    retry_after: int | None = None
    detail: str = ""

    @property
    def type(self) -> str:
        return TYPES[self.reason]

    @property
    def elsewhere(self) -> bool:
        """Whether another worker may succeed."""
        return self.reason not in (Reason.TOO_LARGE, Reason.NO_MEMORY)

    @property
    def retryable(self) -> bool:
        """Whether the client may succeed later."""
        return self.reason is not Reason.TOO_LARGE

    @property
    def broke(self) -> bool:
        """Whether the worker itself is in doubt, not only this answer."""
        return self.reason in (Reason.REFUSED, Reason.LOST, Reason.TIMEOUT, Reason.UNREADABLE)


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
