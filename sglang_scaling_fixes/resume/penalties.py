"""The penalties of a resumed request: as if all of its tokens had been counted one by one.

Stock counts a batch's tokens while it decodes and starts at zero with every prefill; also a
request that it retracted loses its counts.

Where a step is prepared before the one before it has been read (overlap), stock counts one token
late. The step that samples `output[n]` then finds the last token of the prompt and
`output[:n - 1]`. In a pair it finds `output[0]` twice instead, since decode gets that from prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counted:
    """Tokens that were counted; `early` is one that the next step counts once too often."""

    tokens: Sequence[int]
    early: int | None = None


def counted(
    output: Sequence[int], prompt_end: int, *, overlap: bool, pair: bool, waiting: int | None = None
) -> Counted:
    """What stock had counted when it went on after `output` (not empty) without a break.

    `prompt_end`: the prompt's last token. `waiting`: on the decode server of a pair, the token
    that prefill sampled after `output`; the next step there counts it.
    """
    if not overlap:
        return Counted(output)
    first = output[0] if pair else prompt_end
    if waiting is None:
        return Counted([first, *output[:-1]])
    return Counted([first, *output], early=waiting)


def restore(orchestrator: Any, row: int, past: Counted) -> None:
    """Give row `row` of stock's penalizers these counts."""
    import torch

    for penalizer in orchestrator.penalizers.values():
        if not penalizer.is_prepared():
            continue
        own = vars(penalizer)
        if "len_output_tokens" in own:
            own["len_output_tokens"][row] = len(past.tokens) - (past.early is not None)
            continue
        if "cumulated_frequency_penalties" in own:
            counts = own["cumulated_frequency_penalties"][row]
            penalty = own["frequency_penalties"][row]
            ids = torch.tensor(past.tokens, dtype=torch.int64, device=counts.device)
            counts.scatter_add_(0, ids, penalty.expand(len(ids)))
            if past.early is not None:
                counts[past.early] -= penalty[0]
            continue
        kind = "presence" if "cumulated_presence_penalties" in own else "repetition"
        marks = own[f"cumulated_{kind}_penalties"][row]
        ids = torch.tensor(past.tokens, dtype=torch.int64, device=marks.device)
        marks[ids] = own[f"{kind}_penalties"][row][0]
