"""What an event or a body says about the generation it belongs to."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

import orjson

from sglang_scaling_fixes.retry.failure import Failure, Reason
from sglang_scaling_fixes.retry.routes import Family
from sglang_scaling_fixes.retry.sse import data_of

ANOMALY = "kv_anomaly"
"""The `type` of a guard's error, and how its message begins."""

RETRYABLE = frozenset({502, 503, 504})
"""Statuses that say "not here, not now" rather than "not like this"."""
PAIR_RETRYABLE = RETRYABLE | {500}
"""A decode whose prefill was lost says 500."""

_STOCK_TYPES = frozenset(
    {"SERVICE_UNAVAILABLE", "BAD_GATEWAY", "GATEWAY_TIMEOUT", "overloaded_error"}
)
"""What stock names errors with these statuses, where the status itself is not on the wire."""

_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})


@dataclass
class Verdict:
    """`failure`: the attempt is over. `end`: the stream is, as it should be.

    `tokens`: per generation of the request, how many it has by now (`+1`: unknown, this
    event has at least one more). `finished`: generations that ended well.
    """

    failure: Failure | None = None
    end: bool = False
    tokens: dict[int, int] = field(default_factory=dict)
    more: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()


_CONTENT = Verdict()


def remarkable(block: bytes) -> bool:
    """Whether a block of whole events can hold anything but content. Never wrongly False.

    JSON escapes quotes within text, so that `"error"` is a name or value of the API's own.
    """
    # Once for every event of every stream: spelled out, this is three times as fast as a loop.
    return (
        b'"error"' in block
        or b'"abort"' in block
        or b"[DONE]" in block
        or b"kv_anomaly" in block
        or b"message_stop" in block
        or b"response.completed" in block
        or b"response.incomplete" in block
        or b"response.failed" in block
    )


def judge_event(event: bytes, family: Family, retryable: frozenset[int] = RETRYABLE) -> Verdict:
    """`retryable`: statuses of errors within the stream that fail the attempt."""
    data = data_of(event)
    if data == b"[DONE]":
        return Verdict(end=family in (Family.GENERATE, Family.OPENAI))
    said = _loads(data)
    if not isinstance(said, dict):
        return _CONTENT  # a comment, or not ours to understand; it is passed on as it is
    if (failure := _failure(said, retryable)) is not None:
        return Verdict(failure)
    return _progress(said, family)


def _progress(said: dict[str, Any], family: Family) -> Verdict:
    kind = said.get("type")
    if family is Family.RESPONSES:
        more = (0,) if str(kind).endswith(".delta") else ()
        return Verdict(end=kind in _RESPONSE_ENDS, more=more)
    if family is Family.MESSAGES:
        more = (0,) if kind == "content_block_delta" else ()
        return Verdict(end=kind == "message_stop", more=more)
    return _of_generate(said) if isinstance(said.get("meta_info"), dict) else _of_openai(said)


def judge_body(
    status: int, body: bytes, retry_after: int | None, retryable: frozenset[int] = RETRYABLE
) -> Failure | None:
    """None: the body is an answer, if perhaps a refusal, and the client's to have."""
    if 400 <= status < 500 or (status < 400 and b'"abort"' not in body):
        return None
    said = _loads(body)
    parts = said if isinstance(said, list) else [said]
    if status < 400:
        for part in parts:
            if isinstance(part, dict) and (found := _abort(part, retryable)) is not None:
                return found
        return None
    for part in parts:
        if isinstance(part, dict) and (found := _failure(part, frozenset())) is not None:
            return Failure(found.reason, found.message, retry_after)
    if status in retryable:
        words = _message(said) or body[:200].decode(errors="replace")
        return Failure(Reason.UNAVAILABLE, f"status {status}: {words}", retry_after)
    return None


def _of_generate(said: dict[str, Any]) -> Verdict:
    meta = said["meta_info"]
    index = said.get("index", 0)
    index = index if isinstance(index, int) else 0
    count = meta.get("completion_tokens")
    has = bool(said.get("text") or said.get("output_ids"))
    return Verdict(
        tokens={index: count} if isinstance(count, int) else {},
        more=(index,) if has and not isinstance(count, int) else (),
        finished=(index,) if meta.get("finish_reason") else (),
    )


def _of_openai(said: dict[str, Any]) -> Verdict:
    choices = said.get("choices")
    choices = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    usage = said.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    verdict = Verdict()
    # Stock's usage within a stream is that of the event's one choice.
    known = isinstance(count, int) and len(choices) == 1
    for choice in choices:
        index = choice.get("index", 0)
        index = index if isinstance(index, int) else 0
        delta = choice.get("delta")
        content = delta if isinstance(delta, dict) else choice
        if known:
            verdict.tokens[index] = count  # type: ignore[assignment]
        elif any(
            content.get(name) for name in ("content", "reasoning_content", "tool_calls", "text")
        ):
            verdict.more += (index,)
        if choice.get("finish_reason"):
            verdict.finished += (index,)
    return verdict


def _failure(said: dict[str, Any], retryable: frozenset[int]) -> Failure | None:
    """Of one JSON object, whatever its API: an abort, an error, or an error within."""
    if (found := _abort(said, retryable)) is not None:
        return found
    error = said.get("error")
    if error is None and said.get("object") == "error":
        error = said
    if error is None and said.get("type") == "response.failed":
        response = said.get("response")
        error = response.get("error") if isinstance(response, dict) else None
    if error is None and (
        said.get("type") == "error" or str(said.get("detail")).startswith(ANOMALY)
    ):
        error = said
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return None
    message = str(error.get("message") or error.get("detail") or "")
    if ANOMALY in (error.get("type"), error.get("code")) or message.startswith(ANOMALY):
        return Failure(Reason.ANOMALY, message or ANOMALY)
    code = _status(error.get("code"))
    if code in retryable or (retryable and error.get("type") in _STOCK_TYPES):
        return Failure(Reason.UNAVAILABLE, message or f"status {code}")
    return None


def _abort(said: dict[str, Any], retryable: frozenset[int]) -> Failure | None:
    meta = said.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if not isinstance(reason, dict) or reason.get("type") != "abort":
        return None
    message = str(reason.get("message") or "")
    if reason.get("err_type") == ANOMALY or message.startswith(ANOMALY):
        return Failure(Reason.ANOMALY, message or ANOMALY)
    if _status(reason.get("status_code")) in retryable:
        return Failure(Reason.UNAVAILABLE, message or "the worker aborted the request")
    return None


def _loads(data: bytes) -> Any:
    """None if it is no JSON, not even Python's, which has NaN and lone surrogates."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(data) if data else None
    return None


def _status(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) else None


def _message(said: Any) -> str:
    """The words of an error body, in any of the envelopes; "" if it has none."""
    if not isinstance(said, dict):
        return ""
    error = said.get("error", said)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return str(error)[:200]
