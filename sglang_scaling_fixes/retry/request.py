"""What is read from a request's body, and what a prefill/decode pair needs added to it."""

from __future__ import annotations

import random
from typing import Any

import orjson

from sglang_scaling_fixes.retry.settings import Pair

_ROOMS = random.SystemRandom()
LAST_ROOM = 2**63 - 2**16
"""SGLang adds a sample's number to a room, and rooms are signed 64-bit."""


def parse(body: bytes) -> dict[str, Any] | None:
    """The body as a JSON object, None if it is anything else."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return said if isinstance(said, dict) else None


def batch_size(path: str, said: dict[str, Any]) -> int | None:
    """How many prompts the request has; None if it is a single one and not a list."""
    names = ("text", "input_ids", "input_embeds") if path == "/generate" else ("prompt",)
    for name in names:
        value = said.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not value:
            return None
        first = value[0]
        if name == "input_embeds":  # one prompt is a list of vectors
            first = first[0] if isinstance(first, list) and first else None
        return len(value) if isinstance(first, str | list | dict) else None
    return None


def generations(path: str, said: dict[str, Any] | None) -> int:
    """Prompts times samples of each: how many generations a stream of it interleaves."""
    if said is None:
        return 1
    if path == "/vertex_generate":
        prompts, params = said.get("instances"), said.get("parameters")
        inner = params if isinstance(params, dict) else {}
        return generations("/generate", {**inner, "text": prompts})
    samples = said.get("n")
    if path == "/generate":
        params = said.get("sampling_params")
        lists = params if isinstance(params, list) else [params]
        counts = [p.get("n") for p in lists if isinstance(p, dict)]
        samples = max((n for n in counts if isinstance(n, int)), default=1)
    samples = samples if isinstance(samples, int) and samples > 0 else 1
    return (batch_size(path, said) or 1) * samples


def rendezvous(path: str, body: bytes, said: dict[str, Any], pair: Pair) -> bytes:
    """`body` with where, and under which fresh room, the halves of a pair meet.

    The fields come last, after the client's own bytes, which stay as they are; of a name
    that is there twice, JSON readers take the last.
    """
    count = batch_size(path, said)
    fields: dict[str, Any] = {
        "bootstrap_host": pair.host,
        "bootstrap_port": pair.port,
        "bootstrap_room": _room(),
    }
    if count is not None:
        fields = {
            "bootstrap_host": [pair.host] * count,
            "bootstrap_port": [pair.port] * count,
            "bootstrap_room": [_room() for _ in range(count)],
        }
    head = body.rstrip()[:-1]
    return head + (b"," if said else b"") + orjson.dumps(fields)[1:]


def request_id(header: str | None, body: bytes) -> str | None:
    """How the client knows the request: `X-Request-Id`, or else the body's `rid`."""
    if header:
        return header
    rid = (parse(body) or {}).get("rid")
    return str(rid[0] if isinstance(rid, list) and rid else rid) if rid else None


def _room() -> int:
    return _ROOMS.randrange(LAST_ROOM)
