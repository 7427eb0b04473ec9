"""What a client writes to resume an answer, and what is wrong with it. No I/O, no SGLang."""

from __future__ import annotations

import json
from typing import Any

FIELD = "sglang_scaling_fixes_resume"
"""In the JSON body: `{"output_ids": [...]}`, the tokens that the answer has already."""
HEADER = b"x-sglang-scaling-fixes-resumed"
"""Of a response: how many tokens were taken up. A server without this fix does not send it."""
PATHS = frozenset(
    ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
)
_MARK = FIELD.encode()
_MAX_TOKEN = (1 << 31) - 1


class BadResumeError(ValueError):
    """The request cannot be resumed; its text begins with the field's name."""


def refused(why: str) -> BadResumeError:
    return BadResumeError(f"{FIELD}: {why}")


def is_ours(message: object) -> bool:
    """Whether this is the text of a `BadResumeError`, wherever it comes back from."""
    return isinstance(message, str) and message.startswith(f"{FIELD}: ")


def split(body: bytes) -> tuple[bytes, list[int]] | None:
    """The body without the field, and its tokens. None for a body that does not have it.

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
    ids = _ids(request.pop(FIELD))
    _one_answer(request)
    return json.dumps(request).encode(), ids


def _ids(value: Any) -> list[int]:
    if not isinstance(value, dict) or set(value) != {"output_ids"}:
        raise refused(f'{_short(value)} is not {{"output_ids": [token, ...]}}; send just that')
    ids = value["output_ids"]
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
