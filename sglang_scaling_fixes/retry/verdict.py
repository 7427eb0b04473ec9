"""What an event or a body says about its generation: content, progress, end or failure."""

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
"""The `type` of spec-guard's errors; their messages begin with it."""

_STOCK_TYPES = frozenset(
    {"SERVICE_UNAVAILABLE", "BAD_GATEWAY", "GATEWAY_TIMEOUT", "overloaded_error"}
)
"""Stock's error types for these statuses, in the APIs that do not send the status."""

_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})


@dataclass
class EventVerdict:
    """What one event says. Generations are named by their index in the request.

    `failure`: why the attempt has failed. `end`: the stream has ended well.
    `tokens`: how many tokens a generation has by now, where the event says it.
    `more`: generations that have at least one token more, where it does not.
    `finished`: generations that have ended well. `error`: the status of an error that is passed
    on; 500 if it states none.
    """

    failure: Failure | None = None
    end: bool = False
    tokens: dict[int, int] = field(default_factory=dict)
    more: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()
    error: int | None = None


_CONTENT = EventVerdict()


def remarkable(block: bytes) -> bool:
    """Whether a block of whole events may hold more than content. False is always right.

    JSON escapes the quotes within text. So `"error"` is a name or value of the API itself.
    """
    # Called for every event of every stream. Spelled out, it is three times as fast as a loop.
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


def judge_event(event: bytes, family: Family, retryable: frozenset[int]) -> EventVerdict:
    """`retryable`: an error event with one of these statuses fails the attempt."""
    data = data_of(event)
    if data == b"[DONE]":
        return EventVerdict(end=family in (Family.GENERATE, Family.OPENAI))
    said = _loads(data)
    if not isinstance(said, dict):
        return _CONTENT  # a comment, or no JSON object: it is passed on unchanged
    if (failure := _failure(said, retryable)) is not None:
        return EventVerdict(failure)
    verdict = _progress(said, family)
    if (status := _told(said)) is not None:
        verdict.error = status
    return verdict


def _progress(said: dict[str, Any], family: Family) -> EventVerdict:
    kind = said.get("type")
    if family is Family.RESPONSES:
        more = (0,) if str(kind).endswith(".delta") else ()
        return EventVerdict(end=kind in _RESPONSE_ENDS, more=more)
    if family is Family.MESSAGES:
        more = (0,) if kind == "content_block_delta" else ()
        return EventVerdict(end=kind == "message_stop", more=more)
    return _of_generate(said) if isinstance(said.get("meta_info"), dict) else _of_openai(said)


def judge_body(
    status: int, body: bytes, retry_after: int | None, retryable: frozenset[int]
) -> Failure | None:
    """Why the attempt has failed. None: the body is the client's answer, perhaps a refusal.

    `retry_after`: seconds, from the answer's header.
    """
    if (400 <= status < 500 and status not in retryable) or (
        status < 400 and b'"abort"' not in body
    ):
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
            return Failure(found.reason, found.message, retry_after, status=status)
    if status in retryable:
        words = _message(said) or body[:200].decode(errors="replace")
        words = f"status {status}: {words}"
        return Failure(Reason.UNAVAILABLE, words, retry_after, status=status)
    return None


def told_in_body(body: bytes) -> int | None:
    """The status of an error that a successful answer is in truth; None for all others."""
    if b'"abort"' not in body and b'"error"' not in body:
        return None
    said = _loads(body)
    for part in said if isinstance(said, list) else [said]:
        if isinstance(part, dict) and (status := _told(part)) is not None:
            return status
    return None


def _of_generate(said: dict[str, Any]) -> EventVerdict:
    meta = said["meta_info"]
    index = said.get("index", 0)
    index = index if isinstance(index, int) else 0
    count = meta.get("completion_tokens")
    has = bool(said.get("text") or said.get("output_ids"))
    return EventVerdict(
        tokens={index: count} if isinstance(count, int) else {},
        more=(index,) if has and not isinstance(count, int) else (),
        finished=(index,) if meta.get("finish_reason") else (),
    )


def _of_openai(said: dict[str, Any]) -> EventVerdict:
    choices = said.get("choices")
    choices = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    usage = said.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    verdict = EventVerdict()
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
    """The abort or error in one JSON object of any API, also in an inner `response`."""
    if (found := _abort(said, retryable)) is not None:
        return found
    error = _error(said)
    if error is None:
        return None
    message = str(error.get("message") or error.get("detail") or "")
    if ANOMALY in (error.get("type"), error.get("code")) or message.startswith(ANOMALY):
        return Failure(Reason.ANOMALY, message or ANOMALY)
    code = _status(error.get("code"))
    if code in retryable or (retryable and error.get("type") in _STOCK_TYPES):
        return Failure(Reason.UNAVAILABLE, message or f"status {code}", status=code)
    return None


def _told(said: dict[str, Any]) -> int | None:
    """The status of an error or abort that is the client's; None if this is neither."""
    reason = _finish_reason(said)
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return _status(reason.get("status_code")) or 500
    error = _error(said)
    return None if error is None else _status(error.get("code")) or 500


def _error(said: dict[str, Any]) -> dict[str, Any] | None:
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
    return error if isinstance(error, dict) else None


def _finish_reason(said: dict[str, Any]) -> Any:
    meta = said.get("meta_info")
    return meta.get("finish_reason") if isinstance(meta, dict) else None


def _abort(said: dict[str, Any], retryable: frozenset[int]) -> Failure | None:
    """An abort is never what a client of the proxy asked for, unless it blames the request.

    (Its client aborts by leaving.) SGLang blames the request with a status of 4xx.
    """
    reason = _finish_reason(said)
    if not isinstance(reason, dict) or reason.get("type") != "abort":
        return _aborted_choice(said)
    message = str(reason.get("message") or "")
    if reason.get("err_type") == ANOMALY or message.startswith(ANOMALY):
        return Failure(Reason.ANOMALY, message or ANOMALY)
    status = _status(reason.get("status_code"))
    if status is not None and status in retryable:
        words = message or "the worker aborted the request"
        return Failure(Reason.UNAVAILABLE, words, status=status)
    if status is not None and 400 <= status < 500:
        return None
    return Failure(Reason.ABORTED, message or "the worker aborted the request", status=status)


def _aborted_choice(said: dict[str, Any]) -> Failure | None:
    choices = said.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason") == "abort":
            return Failure(Reason.ABORTED, "the worker aborted the request")
    return None


def _loads(data: bytes) -> Any:
    """None if it is not JSON. Python's JSON counts: it has NaN and lone surrogates."""
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
    """The message of an error body in any API's envelope, at most 200 characters; "" without."""
    if not isinstance(said, dict):
        return ""
    error = said.get("error", said)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return str(error)[:200]
