"""What one round of a race gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Round:
    """One valid round as it is reported."""

    round: int
    tries: int
    sent_at_end: int  # bytes of the transfers sent when the end came
    sent_after_end: int
    sent_after_admission: int | None  # bytes sent after the first victim was admitted
    victim_wait_s: float | None  # from the victims' sending to the first admission
    slots_shared: int  # slots of the victims that were the late requests'
    victims: int
    corrupted_pages: int
    wrong_ids: int  # generated ids that differ from the reference
    wrong_outputs: int  # victims with any
    refused: int  # victims that got a clear error
    aborted: int  # late requests that ended early
    lost: int  # messages of decode that the lab lost
    clean_afterwards: bool  # the first victim's prompt, run alone once more, is right
    corrupted: str  # the corrupted positions of the prompts, as ranges
    ends: list[str]  # what the late requests were told
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What is wrong with one victim."""

    corrupted: list[int]  # positions of its prompt
    wrong_ids: int
    problems: list[str]


def ranges(positions: Sequence[int]) -> str:
    """`0-3,7` for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
