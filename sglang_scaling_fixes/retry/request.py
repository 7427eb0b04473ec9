"""A client's request: its bytes as they arrived, and the facts its JSON body states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson
from multidict import CIMultiDict

from sglang_scaling_fixes.retry.routes import Route


@dataclass(frozen=True)
class BodyFacts:
    """What the proxy has to know of a JSON body.

    The parsed body itself is not kept: it takes many times the memory of its bytes, and the
    memory budget counts the bytes alone.
    """

    empty: bool
    """The body is `{}`."""
    batch_size: int | None
    """How many prompts the body lists; None if it has a single prompt and no list."""
    generations: int
    """Prompts times samples of each: how many generations a stream of the answer interleaves."""
    rid: str | None
    """The client's own name for the request, the first one of a list."""


@dataclass(frozen=True)
class ClientRequest:
    """What the client sent. `target` is path and query, byte for byte."""

    method: str
    path: str
    target: str
    headers: CIMultiDict[str]
    body: bytes
    route: Route

    @cached_property
    def facts(self) -> BodyFacts | None:
        """Parsed on first use and never again. None if the body is not a JSON object."""
        return body_facts(self.path, self.body)

    @property
    def generations(self) -> int:
        return self.facts.generations if self.facts else 1

    @property
    def name(self) -> str | None:
        """How the client knows the request: the `X-Request-Id` header, or else the body's `rid`."""
        if header := self.headers.get("x-request-id"):
            return header
        return self.facts.rid if self.facts else None


def body_facts(path: str, body: bytes) -> BodyFacts | None:
    """None if `body` is not a JSON object."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(parsed, dict):
        return None
    return BodyFacts(
        not parsed, _batch_size(path, parsed), _generations(path, parsed), _rid(parsed)
    )


def _batch_size(path: str, parsed: dict[str, Any]) -> int | None:
    names = ("text", "input_ids", "input_embeds") if path == "/generate" else ("prompt",)
    for name in names:
        value = parsed.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not value:
            return None
        first = value[0]
        if name == "input_embeds":  # one prompt is a list of vectors
            first = first[0] if isinstance(first, list) and first else None
        return len(value) if isinstance(first, str | list | dict) else None
    return None


def _generations(path: str, parsed: dict[str, Any]) -> int:
    if path == "/vertex_generate":
        prompts, params = parsed.get("instances"), parsed.get("parameters")
        inner = params if isinstance(params, dict) else {}
        return _generations("/generate", {**inner, "text": prompts})
    samples = parsed.get("n")
    if path == "/generate":
        params = parsed.get("sampling_params")
        lists = params if isinstance(params, list) else [params]
        counts = [p.get("n") for p in lists if isinstance(p, dict)]
        samples = max((n for n in counts if isinstance(n, int)), default=1)
    samples = samples if isinstance(samples, int) and samples > 0 else 1
    return (_batch_size(path, parsed) or 1) * samples


def _rid(parsed: dict[str, Any]) -> str | None:
    rid = parsed.get("rid")
    if isinstance(rid, list) and rid:
        return str(rid[0])
    return str(rid) if rid else None
