"""The paths that are proxied, and what the answers of each look like."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Family(enum.Enum):
    """The format of a stream's events, of its end, and of its errors."""

    GENERATE = "generate"
    """SGLang's own: `meta_info` in each event, then `data: [DONE]`."""
    OPENAI = "openai"
    """`choices` in each event, then `data: [DONE]`."""
    RESPONSES = "responses"
    """Typed events; the last is response.completed, .incomplete or .failed."""
    MESSAGES = "messages"
    """Anthropic's typed events; the last is message_stop."""


class Pairs(enum.Enum):
    """What a prefill/decode pair does with a path."""

    BOTH = "both"
    """Sent to both halves, with the bootstrap address and room."""
    DECODE = "decode"
    """Needs no KV: decode answers alone."""
    NONE = "none"
    """A pair cannot serve it."""


@dataclass(frozen=True)
class Route:
    """`json`: the body is a JSON object."""

    family: Family = Family.OPENAI
    pairs: Pairs = Pairs.NONE
    json: bool = True


_PLAIN = Route()
_TEXT = Route(pairs=Pairs.DECODE)

INFERENCE: dict[str, Route] = {
    "/generate": Route(Family.GENERATE, Pairs.BOTH),
    "/v1/chat/completions": Route(Family.OPENAI, Pairs.BOTH),
    "/v1/completions": Route(Family.OPENAI, Pairs.BOTH),
    "/v1/responses": Route(Family.RESPONSES, Pairs.BOTH),
    "/invocations": Route(Family.OPENAI, Pairs.BOTH),
    "/v1/messages": Route(Family.MESSAGES),
    "/vertex_generate": Route(Family.GENERATE),
    "/v1/audio/transcriptions": Route(json=False),
    "/encode": _PLAIN,
    "/classify": _PLAIN,
    "/v1/embeddings": _PLAIN,
    "/v1/classify": _PLAIN,
    "/v1/score": _PLAIN,
    "/v1/rerank": _PLAIN,
    "/v1/decisions": _PLAIN,
    "/v1/systemone": _PLAIN,
    "/tokenize": _TEXT,
    "/v1/tokenize": _TEXT,
    "/detokenize": _TEXT,
    "/v1/detokenize": _TEXT,
    "/v1/messages/count_tokens": Route(Family.MESSAGES, Pairs.DECODE),
    "/parse_function_call": _TEXT,
    "/separate_reasoning": _TEXT,
}
"""POST, and PUT where SGLang takes it. All of them may be repeated without harm.

Ollama's paths are left out: their streams cannot say that a generation was aborted.
"""

READ = Route(pairs=Pairs.DECODE, json=False)
"""What any worker of the fleet answers alike."""

READS = frozenset(
    {
        "/get_model_info",
        "/model_info",
        "/get_weight_version",
        "/weight_version",
        "/v1/models",
        "/ping",
    }
)
"""The GETs that are passed on, and those of one model below `/v1/models/`. All others concern one
worker: what it holds, how it is loaded, what it stored; or they change it. A new one of SGLang's
is not passed on until somebody has decided."""
MODEL = "/v1/models/"

_PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~:@+-][A-Za-z0-9_.~:@+-]*)+")
"""A path in the one spelling that no server on the way reads as another: no empty, `.` or `..`
segment, no `;`, no escape, no slash at its end."""


def route(method: str, path: str) -> Route | None:
    """`path`: as it was sent, escapes and all. None: the call is not passed on.

    OPTIONS is passed on where its path is: a browser asks before it posts.
    """
    if not _PLAIN_PATH.fullmatch(path):
        return None
    reads = path in READS or path.startswith(MODEL)
    if method in ("GET", "HEAD"):
        return READ if reads else None
    if method == "OPTIONS":
        return READ if reads or path in INFERENCE else None
    return INFERENCE.get(path) if method in ("POST", "PUT") else None
