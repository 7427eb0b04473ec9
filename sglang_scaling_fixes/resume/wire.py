"""What a client writes to resume an answer, and what is wrong with it. No I/O, no SGLang."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FIELD = "sglang_scaling_fixes_resume"
"""In the JSON body: `{"output_ids": [...]}`, the tokens that the answer has already.

With `"report_ids": true` a stream also says its tokens, in comments (`ids_comment`). `"steps"`
gives how many tokens there were behind each of them, so that parsers read the text again in the
pieces in which they have read it: what they say depends on them.
"""
HEADER = b"x-sglang-scaling-fixes-resumed"
"""Of a response: how many tokens were taken up. A server without this fix does not send it."""
PATHS = frozenset(
    ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
)
_MARK = FIELD.encode()
_KEYS = {"output_ids", "report_ids", "steps"}
_MAX_TOKEN = (1 << 31) - 1


class BadResumeError(ValueError):
    """The request cannot be resumed; its text begins with the field's name."""


def refused(why: str) -> BadResumeError:
    return BadResumeError(f"{FIELD}: {why}")


def is_ours(message: object) -> bool:
    """Whether this is the text of a `BadResumeError`, wherever it comes back from."""
    return isinstance(message, str) and message.startswith(f"{FIELD}: ")


@dataclass(frozen=True)
class Ask:
    """What the field says."""

    ids: list[int]
    report_ids: bool = False
    steps: list[int] = field(default_factory=list)
    """Numbers of tokens, each above the one before, the last one at most all."""


def split(body: bytes) -> tuple[bytes, Ask] | None:
    """The body without the field, and what that said. None for a body that does not have it.

    Raises BadResumeError for a field that says something else.
    """
    if _MARK not in body:
        return None
    try:
        request = json.loads(body)
    except ValueError:
        return None  # stock says what is wrong with it
    if not isinstance(request, dict) or FIELD not in request:
        return None
    ask = _ask(request.pop(FIELD))
    _one_answer(request)
    return json.dumps(request).encode(), ask


def _ask(value: Any) -> Ask:
    if not isinstance(value, dict) or not {"output_ids"} <= set(value) <= _KEYS:
        raise refused(
            f'{_short(value)} is not {{"output_ids": [token, ...]}}; send that, and "report_ids": '
            "true if the stream is to say its tokens"
        )
    report = value.get("report_ids", False)
    if not isinstance(report, bool):
        raise refused(f"report_ids {_short(report)} is neither true nor false; use one of the two")
    ids = _ids(value["output_ids"])
    return Ask(ids, report, _steps(value.get("steps", []), len(ids)))


def _steps(steps: Any, most: int) -> list[int]:
    if not isinstance(steps, list):
        raise refused(f"steps {_short(steps)} is not a list; send numbers of tokens")
    before = 0
    for position, count in enumerate(steps):
        if type(count) is not int or not before < count <= most:
            raise refused(
                f"steps[{position}] {_short(count)} is not a number of tokens above {before} and "
                f"up to {most}, which were given; send how many there were behind each comment"
            )
        before = count
    return steps


def _ids(ids: Any) -> list[int]:
    if not isinstance(ids, list):
        raise refused(f"output_ids {_short(ids)} is not a list; send the answer's token ids")
    for position, token in enumerate(ids):
        if type(token) is not int or not 0 <= token <= _MAX_TOKEN:
            raise refused(
                f"output_ids[{position}] {_short(token)} is not a token id; send whole numbers "
                "from 0 on, as the server gave them"
            )
    return ids


def _one_answer(request: dict[str, Any]) -> None:
    sampling = request.get("sampling_params")
    if isinstance(sampling, list):
        raise refused("sampling_params is a list; resume one answer to one prompt in a request")
    for where in (request, sampling if isinstance(sampling, dict) else {}):
        for key in ("n", "best_of", "beam_width"):
            if where.get(key) not in (None, 1):
                raise refused(
                    f"{key} {_short(where[key])} with one answer to resume; use 1, and resume each "
                    "answer in a request of its own"
                )
    for key in ("text", "prompt", "input_ids"):
        value = request.get(key)
        if isinstance(value, list) and not all(type(token) is int for token in value):
            raise refused(f"{key} is a batch; resume one answer to one prompt in a request")
    if request.get("background"):
        raise refused("background true: nobody waits for that answer; use false")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def error_body(path: str, message: str) -> bytes:
    """The JSON of a 400 as the API at `path` writes errors."""
    error = {"message": message, "type": "invalid_request_error", "param": FIELD, "code": 400}
    if path == "/v1/messages":
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"object": "error", "error": error}).encode()


def ids_comment(ids: Sequence[int]) -> bytes:
    """A comment of a stream: the tokens of the events since the comment before this one.

    Clients skip comments. It comes right behind the last event of these tokens.
    """
    return b": %s_ids %s\n\n" % (_MARK, json.dumps([*ids], separators=(",", ":")).encode())
