"""The troubles of one of two prefills, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

SLOW_MBIT = 12.0
FAILING = 20
"""One write in so many fails."""
STOPPED_S = 15.0
_BEGIN_S = 5.0
"""Trouble begins once the load has."""
_AFTER_S = 5.0
"""And there must be a while to see what came of it."""


class Act(Enum):
    """What is done to the ailing prefill."""

    SLOW_LINK = "its link to decode is slow"
    STOP = "SIGSTOP"
    GO_ON = "SIGCONT"
    KILL = "SIGKILL, and a start at the same address at once"
    FAIL_WRITES = "one write in so many fails, and its bytes land later"


@dataclass(frozen=True)
class Aborts:
    """Which requests of the ailing prefill are aborted, and where; seconds after the sending.

    A long prompt is on a slow link for three times as long as its abort may take to come.
    """

    share: float
    at: Literal["prefill", "decode"]
    after_s: tuple[float, float]
    long: bool = False  # the aborted ones have long prompts


@dataclass(frozen=True)
class Case:
    """One trouble: acts at seconds after the load began, and aborts all the time."""

    name: str
    what: str
    script: tuple[tuple[float, Act], ...] = ()
    aborts: Aborts | None = None
    long_share: float = 0.25  # of the ailing prefill's requests that are not aborted
    more: bool = False  # armed is to answer more than stock, not only as many

    @property
    def least_s(self) -> float:
        """A shorter load would not see it."""
        return max((at for at, _ in self.script), default=0.0) + _AFTER_S


UNDISTURBED = Case("undisturbed", "no trouble: the noise of the method")
CASES = (
    Case(
        "slow-link",
        f"{SLOW_MBIT:g} Mbit/s to decode; a quarter of the requests are long and aborted",
        ((0.0, Act.SLOW_LINK),),
        Aborts(0.25, "decode", (4.0, 7.0), long=True),
        long_share=0.0,
    ),
    Case(
        "stopped",
        f"SIGSTOP for {STOPPED_S:g} s",
        ((_BEGIN_S, Act.STOP), (_BEGIN_S + STOPPED_S, Act.GO_ON)),
    ),
    Case(
        "prefill-aborts",
        "30% of the requests are aborted at prefill",
        aborts=Aborts(0.3, "prefill", (0.0, 0.1)),
        more=True,
    ),
    Case("killed", "SIGKILL and restart", ((_BEGIN_S, Act.KILL),)),
    Case(
        "failed-writes",
        f"one write in {FAILING} fails",
        ((0.0, Act.FAIL_WRITES),),
        long_share=0.5,
        more=True,
    ),
)


def chosen(names: Sequence[str], seconds: float) -> list[Case]:
    """The cases of these names, all troubles if there are none; ValueError for a bad choice."""
    by_name = {case.name: case for case in (UNDISTURBED, *CASES)}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"unknown case {unknown[0]!r}; there are: {', '.join(by_name)}")
    cases = [by_name[name] for name in names] or list(CASES)
    for case in cases:
        if seconds < case.least_s:
            raise ValueError(f"--seconds {seconds:g}: case {case.name} needs {case.least_s:g}")
    return cases
