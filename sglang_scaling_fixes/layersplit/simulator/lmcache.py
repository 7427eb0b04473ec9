"""LMCache's agent traces: whole prompts as text, and neither tokens nor block ids.

`timestamp` microseconds since the epoch, `input` the whole prompt, `output`, `session_id`. The
lines are not in time order. Tokens are counted as characters / 4, a rule of thumb for English and
code. A block's id is a digest of the prompt up to the block's end, so that the same id means the
same prefix. The text goes no further than this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from sglang_scaling_fixes.layersplit.simulator.lines import Line
from sglang_scaling_fixes.layersplit.simulator.records import Request

CHARACTERS = 4
"""Of a token: assumed."""


def read(lines: Iterable[Line], block: int) -> Iterator[Request]:
    """In time order; times begin with the first request."""
    ordered = sorted(lines, key=lambda line: line.time("timestamp"))
    for line in ordered:
        text = line.text("input")
        if not text:
            raise line.wrong("input is empty")
        yield Request(
            line=line.number,
            session=line.text("session_id"),
            arrival=(line.time("timestamp") - ordered[0].time("timestamp")) / 1e6,
            delay=0.0,
            prompt=_tokens(text),
            output=_tokens(line.text("output")),
            blocks=tuple(_ids(text, block * CHARACTERS)),
            block=block,
        )


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS)


def _ids(text: str, size: int) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for start in range(0, len(text), size):
        # a lone half of a surrogate pair is valid in JSON and not in UTF-8
        digest.update(text[start : start + size].encode("utf-8", "surrogatepass"))
        yield digest.digest()
