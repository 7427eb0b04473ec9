"""The text of an answer token by token, as a stream would have shown it. No I/O, no SGLang."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

SURROUNDING = 5
"""Tokens before a span that are decoded with it, because they decide its first space."""
_CUT = "�"
"""What a decoder writes for bytes that are no character yet."""


def growing(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], whole: str
) -> list[tuple[int, str]]:
    """`(tokens, the text of so many)` for each token that adds text; the last one is `whole`.

    `decode` gives the text of some tokens. `whole` is what stock made of all of them: where the
    steps do not lead there, it is the only one.
    """
    steps = list(_steps(ids, decode))
    if not steps or not whole.startswith(steps[-1][1]):
        return [(len(ids), whole)]
    if steps[-1][1] != whole:
        steps.append((len(ids), whole))
    return [*steps[:-1], (len(ids), whole)]


def _steps(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[tuple[int, str]]:
    text, before, start = "", 0, 0
    for count in range(1, len(ids) + 1):
        known = decode(ids[before:start])
        new = decode(ids[before:count])[len(known) :]
        if not new or new.endswith(_CUT):
            continue
        text += new
        before, start = max(start, count - SURROUNDING), count
        yield count, text
