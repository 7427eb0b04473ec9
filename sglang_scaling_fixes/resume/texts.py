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

    `decode` gives the text of some tokens. `whole` is what stock made of all of them, behind the
    prompt: many tokenizers leave the first space out where nothing stands before it. Where the
    steps do not lead to `whole` all the same, it is cut into as many pieces as there are tokens. A
    parser that is given a text in one piece does not say what it says of a text that grows: it
    would say it with the next piece, which is no longer given in silence.
    """
    steps = _behind(whole, list(_steps(ids, decode)))
    if not steps or not whole.startswith(steps[-1][1]):
        size = max(len(ids), 1)
        steps = [(count, whole[: len(whole) * count // size]) for count in range(1, size + 1)]
    if steps[-1][1] != whole:
        steps.append((len(ids), whole))
    return [*steps[:-1], (len(ids), whole)]


def at(grown: Sequence[tuple[int, str]], counts: Sequence[int]) -> list[tuple[int, str]]:
    """Of `growing`'s answer, the text at each of these numbers of tokens, and the last one."""
    found, reached, text = [], 0, ""
    for count in counts:
        while reached < len(grown) and grown[reached][0] <= count:
            text = grown[reached][1]
            reached += 1
        found.append((count, text))
    if not found or found[-1] != grown[-1]:
        found.append(grown[-1])
    return found


def _behind(whole: str, steps: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The steps, with the white space that `whole` begins with."""
    if not steps:
        return steps
    first = _space(whole)
    own = _space(steps[-1][1])
    return [(count, first + text[len(own) :]) for count, text in steps if len(text) > len(own)]


def _space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


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
