"""AIPerf's dialect of Mooncake's format: sessions, whose later turns are what they add.

The first turn of a `session_id` is as in Mooncake's format. A later one has `delay` (ms after the
answer before it) in place of `timestamp`, and its `input_length` and `hash_ids` are what the turn
adds to the conversation: to the prompt before it and to that prompt's answer. Answers have no ids
in the file and get their own here. The ids of each part are rounded up to whole blocks, so a
session may have more of them than its tokens fill: those are cut.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from sglang_scaling_fixes.layersplit.simulator.lines import MOST_TOKENS, Line
from sglang_scaling_fixes.layersplit.simulator.records import Request


def read(lines: Iterable[Line], block: int) -> Iterator[Request]:
    """The whole prompt of every turn."""
    so_far: dict[str, tuple[int, tuple[Hashable, ...]]] = {}
    for line in lines:
        session = line.text("session_id")
        later = session in so_far
        tokens, ids = so_far.get(session, (0, ()))
        added, added_ids = line.count("input_length", 1), line.ids("hash_ids")
        if len(added_ids) < -(-added // block):
            raise line.wrong(
                f"{len(added_ids)} hash_ids for {added} tokens; blocks of {block} (--block-size) "
                f"make {-(-added // block)}"
            )
        prompt, ids = tokens + added, ids + added_ids
        if prompt > MOST_TOKENS:
            raise line.wrong(f"session_id {session!r} has grown to {prompt} tokens")
        output = line.count("output_length", 0)
        answer = tuple(("answer", line.number, n) for n in range(-(-output // block)))
        so_far[session] = prompt + output, ids + answer
        timed = not later or "timestamp" in line.fields
        yield Request(
            line=line.number,
            session=session,
            arrival=line.time("timestamp") / 1000 if timed else None,
            delay=0.0 if timed else line.time("delay") / 1000,
            prompt=prompt,
            output=output,
            blocks=ids[: -(-prompt // block)],
            block=block,
        )
