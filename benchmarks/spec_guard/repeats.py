"""How much real text repeats itself: the high rule's second condition, without any model.

If a draft were always right, the rate would be 1 and only the repetition would keep the guard
still. So a tail of real text is taken for a generated one, at every place where the guard might
count: `detector.repetition` of the `TAIL` tokens before it. Tokens are words and punctuation
marks; a model's are shorter, which makes an n-gram of them shorter and more often repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.reports import markdown_table
from benchmarks.spec_guard import texts
from benchmarks.spec_guard.replay import Count, percentile
from sglang_scaling_fixes.specguard.detector import TAIL, repetition

STEP = 64
"""Tokens between two places that are looked at."""
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
PERCENTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Repeats:
    """Of one class."""

    documents: int
    scores: list[float]  # at each place looked at
    reached: dict[float, int]  # documents with a place at or above each threshold


def measure(documents: Sequence[str], piece: int) -> Repeats:
    """Over all documents; `piece` as in `pieces`."""
    scores: list[float] = []
    reached = dict.fromkeys(THRESHOLDS, 0)
    looked = 0
    for text in documents:
        ids: dict[str, int] = {}
        tokens = [ids.setdefault(word, len(ids)) for word in pieces(text, piece)]
        own = [repetition(tokens[end - TAIL : end]) for end in range(TAIL, len(tokens) + 1, STEP)]
        if own:
            looked += 1
            scores += own
            for threshold in THRESHOLDS:
                reached[threshold] += max(own) >= threshold
    return Repeats(looked, scores, reached)


def pieces(text: str, length: int) -> list[str]:
    """Words and marks, cut into pieces of `length` characters; 0: whole words."""
    words = texts.words(text)
    if not length:
        return words
    return [word[at : at + length] for word in words for at in range(0, len(word), length)]


PIECE = 4
"""Characters of a piece: about what a model's token has in prose."""


def report(documents: dict[str, list[str]]) -> str:
    scores, reached = [], []
    for name, found in documents.items():
        for tokens, length in (("words", 0), ("pieces", PIECE)):
            repeats = measure(found, length)
            head = [f"{name}, {tokens}", repeats.documents]
            own = repeats.scores
            above = [sum(score >= t for score in own) / len(own) for t in THRESHOLDS]
            scores.append(
                [
                    *head,
                    len(own),
                    *(f"{percentile(own, p):.2f}" for p in PERCENTILES),
                    *(f"{share:.2%}" for share in above),
                ]
            )
            reached.append([*head, *map(str, counts(repeats))])
    limits = [f">= {t:g}" for t in THRESHOLDS]
    return (
        f"Repetition of the last {TAIL} tokens, every {STEP} tokens of real text. `pieces`: words"
        f" cut into {PIECE} characters at most, nearer to a model's tokens.\n\n"
        + markdown_table(
            ["text", "documents", "places", *(f"p{100 * p:g}" for p in PERCENTILES), *limits],
            scores,
        )
        + "\nDocuments with such a place anywhere: would be stopped if drafted perfectly.\n\n"
        + markdown_table(["text", "documents", *limits], reached)
    )


def counts(repeats: Repeats) -> list[Count]:
    return [Count(repeats.reached[t], repeats.documents) for t in THRESHOLDS]
