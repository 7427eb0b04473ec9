"""Prompts, and what is right for each: what an undisturbed stock pair answers.

Near-ties are left out. A float32 sum depends on what else is in the batch, so a prompt counts only
if it is answered alike by both prefills, alone and among others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.races.reference import random_prompt

SHORT, LONG = 16, 3
"""How many prompts."""
SHORT_TOKENS, LONG_TOKENS = (60, 200), (900, 1000)
NEW_TOKENS = 8
_MORE = 2
"""So many more are asked, for those that are left out."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Known:
    prompt: tuple[int, ...]
    ids: Ids


@dataclass(frozen=True)
class Prompts:
    """`long`: only of the ailing prefill; each is more than a tenth of the default pool."""

    short: tuple[Known, ...]
    long: tuple[Known, ...]


def candidates(seed: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Short and long prompts to ask an undisturbed pair, a few more than needed."""
    draw = random.Random(f"degraded-{seed}")
    return tuple(  # type: ignore[return-value]
        [tuple(random_prompt(draw, draw.randint(*tokens))) for _ in range(number + _MORE)]
        for number, tokens in ((SHORT, SHORT_TOKENS), (LONG, LONG_TOKENS))
    )


def agreed(
    prompts: Sequence[tuple[int, ...]], asked: Sequence[Sequence[Ids]], wanted: int
) -> tuple[Known, ...]:
    """The first `wanted` prompts that got the same answer each time; LabError for too few."""
    answers = zip(prompts, *asked, strict=True)
    known = [Known(prompt, ids[0]) for prompt, *ids in answers if len(set(ids)) == 1]
    if len(known) < wanted:
        raise LabError(f"an undisturbed pair answers only {len(known)} of {wanted} prompts alike")
    return tuple(known[:wanted])
