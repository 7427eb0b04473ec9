"""Mooncake's traces (FAST'25): one request a line, prefix blocks by ids that all requests share.

`timestamp` ms after the start, `input_length` and `output_length` tokens, `hash_ids` an id for
each block of the prompt: ceil(input_length / block) of them. The published conversation and
synthetic traces have blocks of 512 tokens, and ticks of 3 s in the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sglang_scaling_fixes.layersplit.simulator.lines import Line
from sglang_scaling_fixes.layersplit.simulator.records import Request

BLOCK = 512
"""Tokens, unless told otherwise."""


def read(lines: Iterable[Line], block: int) -> Iterator[Request]:
    """Each line is a session of its own: the format does not say which belong together."""
    for line in lines:
        prompt, ids = line.count("input_length", 1), line.ids("hash_ids")
        wanted = -(-prompt // block)
        if len(ids) != wanted:
            raise line.wrong(
                f"{len(ids)} hash_ids for {prompt} tokens; blocks of {block} (--block-size) make "
                f"{wanted}"
            )
        yield Request(
            line=line.number,
            session=line.number,
            arrival=line.time("timestamp") / 1000,
            delay=0.0,
            prompt=prompt,
            output=line.count("output_length", 0),
            blocks=ids,
            block=block,
        )
