"""What sound text is called an anomaly: simulated acceptance through the real detector.

No model and no server. Drafts of text that repeats itself are accepted with a probability of 0.99
each, as those of a good draft model are; drafts of a stretch that cannot be guessed, such as
random hex, almost never. Tokens are words and marks, cut to `repeats.PIECE` characters: a model's
own tokens differ, so the first table shows which kinds of text are ended rather than how long they
must be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.common.reports import markdown_table
from benchmarks.spec_guard import repeats
from benchmarks.spec_guard.replay import Count
from sglang_scaling_fixes.specguard.detector import SETS, Rules, Watch, repetition

DEPTH = 3
PREDICTABLE = 0.99
"""Probability that one draft of text that repeats itself is accepted."""
SEEDS = 20
SOUND, UNGUESSED = 2.6, 1.1
"""Accept lengths of ordinary text, and of a stretch that no draft can guess (assumed)."""
STRETCHES = (128, 192, 256, 384, 487, 640, 955)
"""Tokens. 20 UUIDs are 487 of DeepSeek's, 1 KB in base64 is 955."""
LONG = 8000
TRUE_LENGTHS = {1: (1.45, 1.5, 1.55, 1.6), 2: (1.5, 1.55, 1.6, 1.65), 3: (1.5, 1.6, 1.65, 1.7),
                5: (1.6, 1.65, 1.7, 1.75)}  # fmt: skip
"""By depth."""

_REFRAIN = "and the river rolls along, and the river rolls along, carry me home tonight.\n"


def honest_texts() -> dict[str, str]:
    """What a user may ask for."""
    row = "0.0, " * 8
    return {
        "one word 300 times": "hello " * 300,
        "zeros, 40 rows of 8": f"[{row}],\n" * 40,
        "C array of 0x00": "static const uint8_t t[] = {\n" + ("0x00, " * 12 + "\n") * 24,
        "LaTeX identity, 16 x 16": "\n".join(
            " & ".join("1" if n == m else "0" for m in range(16)) + " \\\\" for n in range(16)
        ),
        "HTML table of equal cells": ("<tr>" + "<td>n/a</td>" * 4 + "</tr>\n") * 20,
        "DNA repeats": "CAG " * 250,
        "song with a refrain": "".join(
            f"Verse {n} speaks of road {n} and town {n}.\n{_REFRAIN * 3}" for n in range(8)
        ),
        "99 bottles": "".join(
            f"{n} bottles of beer on the wall, {n} bottles of beer. Take one down and pass it "
            f"around, {n - 1} bottles of beer on the wall.\n"
            for n in range(99, 79, -1)
        ),
        "SQL inserts": "".join(
            f"INSERT INTO users (id, name, mail) VALUES ({n}, 'user{n * 7919 % 997}', "
            f"'{n * 104729 % 9973}@example.com');\n"
            for n in range(40)
        ),
        "JSON list": "".join(
            f'{{"id": {n}, "name": "item {n * 7919 % 997}", "active": true, "tags": []}},\n'
            for n in range(40)
        ),
    }


def report() -> str:
    return "\n".join(
        [
            f"Simulated: drafts accepted at random, depth {DEPTH}, {SEEDS} requests each.\n",
            "## Text that repeats itself, each draft accepted with a probability of "
            f"{PREDICTABLE}\n",
            _repeating(),
            f"## A stretch that no draft can guess in an answer of accept length {SOUND}\n",
            f"Accept length {UNGUESSED} within it.\n",
            _stretches(),
            f"## Sound answers of {LONG} tokens, by depth and accept length\n",
            _long(),
        ]
    )


def _repeating() -> str:
    rows = []
    for name, text in honest_texts().items():
        ids: dict[str, int] = {}
        tokens = [ids.setdefault(w, len(ids)) for w in repeats.pieces(text, repeats.PIECE)]
        most = max(repetition(tokens[:end]) for end in range(16, len(tokens) + 1, 16))
        answer = partial(steps, depth=DEPTH, probability=PREDICTABLE, tokens=len(tokens))
        found = [ended(rules, answer, tokens) for rules in SETS.values()]
        rows.append([name, len(tokens), f"{most:.2f}", *found])
    return markdown_table(["text", "tokens", "most repetition", *SETS], rows)


def _stretches() -> str:
    rows = [
        [length, *(ended(rules, partial(_around, length=length)) for rules in SETS.values())]
        for length in STRETCHES
    ]
    return markdown_table(["tokens of the stretch", *SETS], rows)


def _around(draw: random.Random, length: int) -> Iterator[int]:
    for mean, tokens in ((SOUND, 600), (UNGUESSED, length), (SOUND, 900)):
        yield from steps(draw, DEPTH, chance(mean, DEPTH), tokens)


def _long() -> str:
    rows = []
    for depth, lengths in TRUE_LENGTHS.items():
        for length in lengths:
            p = chance(length, depth)
            answer = partial(steps, depth=depth, probability=p, tokens=LONG)
            found = [ended(rules, answer, depth=depth) for rules in SETS.values()]
            rows.append([depth, f"{length:g}", *found])
    return markdown_table(["depth", "accept length", *SETS], rows)


def steps(draw: random.Random, depth: int, probability: float, tokens: int) -> Iterator[int]:
    """Accepted drafts of one verification after another, for about so many tokens."""
    written = 0
    while written < tokens:
        accepted = 0
        while accepted < depth and draw.random() < probability:
            accepted += 1
        written += 1 + accepted
        yield accepted


def chance(length: float, depth: int) -> float:
    """The probability of a draft that gives this accept length."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = sum(middle**n for n in range(depth + 1))
        low, high = (middle, high) if mean < length else (low, middle)
    return low


def ended(
    rules: Rules,
    answer: Callable[[random.Random], Iterator[int]],
    tokens: Sequence[int] = range(2 * LONG),
    depth: int = DEPTH,
) -> Count:
    """How many of `SEEDS` such answers are called an anomaly; `tokens`: new ones by default."""
    hits = 0
    for seed in range(SEEDS):
        watch, accepted = Watch(rules), 0
        for number, more in enumerate(answer(random.Random(seed)), start=1):
            accepted += more
            if watch.observe(rules, number, accepted, depth, tokens[: number + accepted]):
                hits += 1
                break
    return Count(hits, SEEDS)
