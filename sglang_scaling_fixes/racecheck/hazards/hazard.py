"""What a hazard is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sglang_scaling_fixes.racecheck.recorder import Recorder

Scenario = Callable[[Recorder], None]
"""One play: says who does what, in which order on the host."""


@dataclass(frozen=True)
class Hazard:
    """`asks`: the question. `plays` are run one by one, each in a history of its own."""

    name: str
    asks: str
    plays: Callable[[], Iterator[Scenario]]
