"""A client's request: its bytes as they arrived, and the facts its JSON body states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from multidict import CIMultiDict

from sglang_scaling_fixes.retry.routes import Route

SMALL_BYTES = 1 << 16
"""A field of the API that is not text is looked into up to this size."""
MANY_PROMPTS = 1 << 16
"""More prompts, or parts of them, than any server takes in one request."""
BEGINNING_BYTES = 512
"""Of a prompt that is no list of messages: what is taken for its conversation's beginning. A first
turn that is shorter does not count for one with its later turns."""
SESSION_HEADERS = ("x-session-id", "x-smg-routing-key", "x-conversation-id", "session-id")
"""A client's own name for the conversation that a request belongs to."""

Raw = msgspec.Raw
_NOTHING = Raw(b"")


class TooMany(ValueError):
    """A list has more parts than `MANY_PROMPTS`."""


class Steered(ValueError):
    """A routing field stands where it cannot be taken back."""


class _Body(msgspec.Struct):
    """The fields of all APIs that are looked at. What else the body holds is passed over."""

    text: Raw = _NOTHING
    input_ids: Raw = _NOTHING
    input_embeds: Raw = _NOTHING
    prompt: Raw = _NOTHING
    messages: Raw = _NOTHING
    input: Raw = _NOTHING
    instances: Raw = _NOTHING
    parameters: Raw = _NOTHING
    sampling_params: Raw = _NOTHING
    n: Raw = _NOTHING
    rid: Raw = _NOTHING
    stream: Raw = _NOTHING
    bootstrap_host: Raw = _NOTHING
    bootstrap_port: Raw = _NOTHING
    bootstrap_room: Raw = _NOTHING
    bootstrap_pair_key: Raw = _NOTHING
    data_parallel_rank: Raw = _NOTHING
    routed_dp_rank: Raw = _NOTHING
    disagg_prefill_dp_rank: Raw = _NOTHING
    sglang_scaling_fixes_resume: Raw = _NOTHING


class _Message(msgspec.Struct):
    role: str | None = None


ROUTING_FIELDS = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "data_parallel_rank",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
)
"""Where in the fleet a request goes is the proxy's to say: no client's reach a worker."""

_EMPTY = re.compile(rb"\s*\{\s*\}")
_body = msgspec.json.Decoder(_Body)
_raws = msgspec.json.Decoder(list[Raw])
_message = msgspec.json.Decoder(_Message)


@dataclass(frozen=True)
class BodyFacts:
    """What the proxy has to know of a JSON body.

    The parsed body itself is not kept, nor made: it takes many times the memory of its bytes.
    """

    empty: bool
    """The body is `{}`."""
    stream: bool
    resumes: bool
    """The client itself says which tokens its answer has already."""
    batch_size: int | None
    """How many prompts the body lists; None if it has a single prompt and no list."""
    generations: int
    """Prompts times samples of each: how many generations a stream of the answer interleaves."""
    rid: str | None
    """The client's own name for the request, the first one of a list."""
    beginning: bytes
    """A digest of what all requests of one conversation begin with; b"" if there is no prompt."""
    routing: tuple[str, ...]
    """The fields of `ROUTING_FIELDS` that the client has set."""


@dataclass(frozen=True)
class ClientRequest:
    """What the client sent. `target` is path and query, byte for byte.

    `facts` is None if the body is not a JSON object. `name`: how logs call the request.
    """

    method: str
    path: str
    target: str
    headers: CIMultiDict[str]
    body: bytes
    route: Route
    facts: BodyFacts | None
    name: str

    @property
    def generations(self) -> int:
        return self.facts.generations if self.facts else 1

    @property
    def key(self) -> bytes:
        """Requests of one conversation have the same; b"" if nothing tells."""
        for name in SESSION_HEADERS:
            if value := self.headers.get(name):
                return value.encode()
        return self.facts.beginning if self.facts else b""


def body_facts(path: str, body: bytes) -> BodyFacts | None:
    """None if `body` is not a JSON object. Raises TooMany."""
    try:
        found = _body.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    if path == "/vertex_generate" and _first_byte(found.parameters) == b"{":
        inner = _body.decode(found.parameters)
        for name in ROUTING_FIELDS:
            if _given(getattr(inner, name)):
                raise Steered(f"parameters.{name} is not a client's to set; leave it out")
    # An array decodes to no struct, so the body is an object.
    return BodyFacts(
        resumes=_given(found.sglang_scaling_fixes_resume),
        stream=bytes(memoryview(found.stream)[:5]) == b"true",
        empty=_EMPTY.match(body) is not None,
        batch_size=_batch_size(path, found),
        generations=_generations(path, found),
        rid=_rid(found.rid),
        beginning=_digest(_beginning(found)),
        routing=tuple(name for name in ROUTING_FIELDS if _given(getattr(found, name))),
    )


def with_fields(body: bytes, facts: BodyFacts, fields: dict[str, Any]) -> bytes:
    """`body`, a JSON object of these facts, with more fields at its end.

    The client's own bytes before them stay as they are. If the client sent the same fields, ours
    count: JSON readers take the last value of a name.
    """
    if not fields:
        return body
    head = body.rstrip()[:-1]
    return head + (b"" if facts.empty else b",") + msgspec.json.encode(fields)[1:]


def without_routing(facts: BodyFacts) -> dict[str, Any]:
    """The fields that take the client's own routing back."""
    return dict.fromkeys(facts.routing)


def _batch_size(path: str, found: _Body) -> int | None:
    names = ("text", "input_ids", "input_embeds") if path == "/generate" else ("prompt",)
    for name in names:
        value: Raw = getattr(found, name)
        if not _given(value):
            continue
        first = _first(value)
        if name == "input_embeds" and first == b"[":  # one prompt is a list of vectors
            first = _first(Raw(memoryview(value)[1:]))
        return len(_parts(value)) if first in (b'"', b"[", b"{") else None
    return None


def _given(value: Raw) -> bool:
    return bytes(memoryview(value)[:5]) not in (b"", b"null")


def _first_byte(value: Raw) -> bytes:
    return bytes(memoryview(value)[:1])


def _first(value: Raw) -> bytes:
    """How the first element of a list begins, b"" if the value is none or has none."""
    head = bytes(memoryview(value)[:256]).lstrip()
    if not head.startswith(b"["):
        return b""
    return head[1:].lstrip()[:1]


def _parts(value: Raw) -> list[Raw]:
    """The elements of a list. Raises TooMany: each takes memory of its own."""
    if bytes(value).count(b",") > 16 * MANY_PROMPTS or len(found := _raws.decode(value)) > (
        MANY_PROMPTS
    ):
        raise TooMany(f"the body lists more than {MANY_PROMPTS} prompts")
    return found


def _generations(path: str, found: _Body) -> int:
    if path == "/vertex_generate":
        return _list_size(found.instances) * _samples(_small(found.parameters))
    if path == "/generate":
        return (_batch_size(path, found) or 1) * _samples(
            _small(found.sampling_params), inner=False
        )
    samples = _small(found.n)
    return (_batch_size(path, found) or 1) * (_count(samples))


def _list_size(value: Raw) -> int:
    return max(1, len(_parts(value))) if _first(value) else 1


def _samples(said: Any, inner: bool = True) -> int:
    """`n` of sampling parameters, or of one of a list of them. `inner`: they are a field."""
    if inner:
        said = said.get("sampling_params") if isinstance(said, dict) else None
    each = said if isinstance(said, list) else [said]
    return max((_count(p.get("n")) for p in each if isinstance(p, dict)), default=1)


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 1


def _rid(value: Raw) -> str | None:
    rid = _small(value)
    if isinstance(rid, list) and rid:
        return str(rid[0])
    return str(rid) if rid else None


def _small(value: Raw) -> Any:
    """The value if it is not large, else None; also if it has a number that is too large."""
    data = memoryview(value)
    if not 0 < data.nbytes <= SMALL_BYTES:
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest() if data else b""


def _beginning(found: _Body) -> bytes:
    """All messages up to the user's first: what follows grows with each turn.

    Many conversations share a system prompt. So it alone does not tell them apart.
    """
    for value in (found.messages, found.input):
        if _first(value) == b"{":
            return _to_first_user(value)
    for value in (found.input, found.prompt, found.text, found.input_ids):
        if _given(value):
            return bytes(memoryview(value)[:BEGINNING_BYTES])
    return b""


def _to_first_user(messages: Raw) -> bytes:
    try:
        parts = _parts(messages)
    except (TooMany, msgspec.DecodeError):
        return bytes(memoryview(messages)[:BEGINNING_BYTES])
    begun = []
    for part in parts:
        begun.append(bytes(part))
        try:
            if _message.decode(part).role == "user":
                break
        except msgspec.DecodeError:
            break
    return b"".join(begun)
