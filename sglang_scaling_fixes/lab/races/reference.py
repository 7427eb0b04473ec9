"""A prompt and what is right for it, and how far an answer is from that."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_scaling_fixes.lab.servers import checkpoints

MARGIN = 1e-3
"""Least distance, in log-probability, of each reference token to the runner-up: a batch
rounds sums differently than a request alone, by some 1e-6, and must not be called wrong."""
WITH_MARGIN = {"return_logprob": True, "top_logprobs_num": 2}
"""What a request asks for so that `margin` can be told."""


@dataclass(frozen=True)
class Reference:
    """A prompt, and what the servers made of it when it was alone."""

    prompt: list[int]
    new_tokens: int
    ids: list[int]  # the tokens it generated
    digests: list[int]  # of the KV of each of its tokens


def margin(body: Any) -> float:
    """Least distance of a chosen token to the next one, in log-probability; 0: unknown."""
    if not isinstance(body, dict):
        return 0.0
    tops = body.get("meta_info", {}).get("output_top_logprobs") or []
    return min((abs(top[0][0] - top[1][0]) for top in tops if top), default=0.0)


def differing(ids: Sequence[int], expected: Sequence[int]) -> int:
    """At how many positions two outputs differ; a missing one counts."""
    both = min(len(ids), len(expected))
    return sum(ids[i] != expected[i] for i in range(both)) + abs(len(ids) - len(expected))


def random_prompt(draw: random.Random, length: int) -> list[int]:
    """So many token ids, drawn anew."""
    return [draw.randrange(3, checkpoints.VOCAB) for _ in range(length)]
