"""The paths that are proxied, and what the answers of each look like."""

from __future__ import annotations

import enum
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
    family: Family = Family.OPENAI
    pairs: Pairs = Pairs.NONE


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
    "/v1/audio/transcriptions": _PLAIN,
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

READ = Route(pairs=Pairs.DECODE)
"""A GET of any path that is not in CHANGING_GETS."""

CHANGING_GETS = frozenset(
    {
        "/flush_cache",
        "/start_profile",
        "/stop_profile",
        "/set_trace_level",
        "/freeze_gc",
        "/start_expert_distribution_record",
        "/stop_expert_distribution_record",
        "/dump_expert_distribution_record",
        "/get_weights_by_name",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/weights_checker",
        "/slow_down",
        "/open_session",
        "/close_session",
        "/configure_logging",
    }
)
"""SGLang accepts these as GET too, and they change the worker that gets them."""


def route(method: str, path: str) -> Route | None:
    """None: the call concerns one worker, and the proxy does not send it to all of them."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return None if path in CHANGING_GETS else READ
    return INFERENCE.get(path) if method in ("POST", "PUT") else None
