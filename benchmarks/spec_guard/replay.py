"""The recorded requests once more, through the real detector, under any rules.

What the guard sees of a running request are its counters and its tokens; both are recorded for
each verification. So what it would have said, and when, needs no server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.spec_guard.recording import DRAFTS, Record
from sglang_scaling_fixes.specguard.detector import Anomaly, Rules, Watch

DEFAULT = Rules()
WINDOWS = (0, 128, 256, 512)
REPETITIONS = (0.0, 0.3, 0.5, 0.7, 0.9)


def settings() -> dict[str, Rules]:
    """The rules that are compared, by name; the first is as published."""
    return {
        f"{window or 'none'} / {share:g}": replace(DEFAULT, window=window, repetition=share)
        for window in WINDOWS
        for share in REPETITIONS
    }


def watch(record: Record, rules: Rules) -> Anomaly | None:
    """The first anomaly of the request; None without one."""
    watched, accepted = Watch(rules), 0
    for number, digit in enumerate(record.accepted, start=1):
        accepted += int(digit)
        # Prefill gives the first token, every verification its drafts and one more.
        sent = 1 + number + accepted
        found = watched.observe(rules, number, accepted, DRAFTS, record.ids[:sent])
        if found is not None:
            return found
    return None


def agreement(record: Record, twin: Record) -> int | None:
    """How many generated tokens come before the first that differs; None if none does."""
    for number, (ours, clean) in enumerate(zip(record.ids, twin.ids, strict=False)):
        if ours != clean:
            return number
    return None


@dataclass(frozen=True)
class Count:
    """`of` requests, of which `hits`."""

    hits: int
    of: int

    @property
    def bound(self) -> float:
        """Upper end of the 95% interval of the share when there was no hit: the rule of three."""
        return min(3 / self.of, 1.0) if self.of else 1.0

    def __str__(self) -> str:
        if not self.of:
            return "-"
        if not self.hits:
            return f"0 of {self.of} (< {self.bound:.1%})"
        return f"{self.hits} of {self.of} ({self.hits / self.of:.1%})"


def alarms(records: Iterable[Record], rules: Rules) -> Count:
    """How many of the requests are called anomalous."""
    found = [watch(record, rules) for record in records]
    return Count(sum(anomaly is not None for anomaly in found), len(found))


@dataclass(frozen=True)
class Verdict:
    """What became of one corrupt request under some rules. Positions in generated tokens."""

    record: Record
    changed: int | None  # the first token that differs from the clean twin's
    found: Anomaly | None
    twin_found: bool  # the clean twin is called anomalous too: it proves nothing

    @property
    def after(self) -> int:
        assert self.record.corruption is not None
        return self.record.corruption.after

    @property
    def delay(self) -> int | None:
        """Tokens from the corruption to its detection; None where it was not detected.

        An alarm before the KV was touched detects nothing.
        """
        if self.found is None or self.found.tokens < self.after:
            return None
        return self.found.tokens - self.after


def verdicts(records: Iterable[Record], twins: dict[str, Record], rules: Rules) -> list[Verdict]:
    """Of the corrupt requests among `records`."""
    found = []
    heard: dict[str, Anomaly | None] = {}
    for record in records:
        if record.corruption is None or record.twin is None:
            continue
        twin = twins[record.twin]
        if twin.name not in heard:
            heard[twin.name] = watch(twin, rules)
        alarm = heard[twin.name]
        # A twin may go on longer than the corrupt request did.
        in_time = alarm is not None and alarm.tokens <= len(record.ids)
        found.append(Verdict(record, agreement(record, twin), watch(record, rules), in_time))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank; `share` from 0 to 1."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
