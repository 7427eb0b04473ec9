"""A recording as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.common.reports import markdown_table
from benchmarks.spec_guard import replay
from benchmarks.spec_guard.recording import Record, Recording
from benchmarks.spec_guard.replay import Count, Verdict, percentile
from sglang_scaling_fixes.lab.faults.corrupt import KINDS
from sglang_scaling_fixes.specguard.detector import SETS, Rules, repetition

PERCENTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LENGTHS = (1.05, 1.1, 1.2, 1.3, 1.4, 1.6)
"""Thresholds of the low rule that are compared."""

Groups = dict[str, list[Record]]


def report(recording: Recording) -> str:
    groups = clean_groups(recording.records)
    twins = {r.name: r for r in recording.records if r.role in {"twin", "long"}}
    corrupt = sorted((r for r in recording.records if r.role == "corrupt"), key=order)
    parts = [
        about(recording),
        "## Accept length and rate of whole requests\n",
        distributions({**groups, **corrupt_groups(corrupt)}),
        "## False alarms: clean requests that are called anomalous\n",
        "Both rules; window in tokens / repetition as a share of n-grams; `none / 0` is the"
        " published rule.\n",
        false_alarms(groups, replay.settings()),
        "### The low rule alone, by window\n",
        false_alarms(groups, low_settings()),
        "### The high rule alone, by window / repetition\n",
        false_alarms(groups, high_settings()),
        "## Detection at the default, by corruption\n",
        detection(replay.verdicts(corrupt, twins, replay.DEFAULT)),
        "## The rules by name\n",
        by_name(groups, corrupt, twins),
        "## Detection by setting\n",
        by_setting(corrupt, twins),
        "## The low threshold, all of the context overwritten, otherwise the default\n",
        by_threshold(groups, corrupt, twins),
        "## Clean answers to the same prompt, asked twice\n",
        control(recording.records, twins),
    ]
    return "\n".join(parts)


def clean_groups(records: Sequence[Record]) -> Groups:
    """The clean requests: by class, then the long ones."""
    groups: Groups = {}
    for record in records:
        if record.role == "clean":
            groups.setdefault(record.group, []).append(record)
    groups = dict(sorted(groups.items()))
    late = [record for record in records if record.role == "long"]
    return {**groups, "long": late} if late else groups


def corrupt_groups(records: Sequence[Record]) -> Groups:
    groups: Groups = {}
    for record in sorted(records, key=order):
        if record.corruption is not None:
            what = record.corruption
            groups.setdefault(what.label, []).append(record)
    return groups


def about(recording: Recording) -> str:
    what = recording.about
    records = recording.records
    roles = [r.role for r in records]
    merged = sum(r.merged for r in records)
    verified = sum(r.verifications for r in records)
    sources = ", ".join(f"{n} {name}" for name, n in what["documents"].items())
    return (
        f"SGLang {what['release']}, the lab's tiny GLM-5.1 on {what['cores']} CPU cores,"
        f" {what['seconds'] / 60:.0f} minutes, {what['concurrency']} requests at a time."
        f" {roles.count('clean')} clean requests and {roles.count('long')} long ones,"
        f" {roles.count('corrupt')} corrupt ones, {roles.count('twin')} clean twins. Distinct"
        f" documents their prompts are from: {sources}. {sum(r.cached > 0 for r in records)}"
        f" requests found cached KV. Of {verified} verifications {merged} shared a chunk of the"
        " stream with another (their sum is known, their order is not).\n"
    )


def distributions(groups: Groups) -> str:
    """Accept length at percentiles, then median and 99th percentile of rate and repetition."""
    rows = []
    for name, records in groups.items():
        lengths = [r.accept_length for r in records]
        rates = [r.accept_rate for r in records]
        again = [repetition(r.ids) for r in records]
        rows.append(
            [
                name,
                len(records),
                *(f"{percentile(lengths, p):.2f}" for p in PERCENTILES),
                f"{percentile(rates, 0.5):.2f}",
                f"{percentile(rates, 0.99):.2f}",
                f"{percentile(again, 0.5):.2f}",
            ]
        )
    head = ["class", "requests", *(f"p{100 * p:.0f}" for p in PERCENTILES)]
    return markdown_table([*head, "rate p50", "rate p99", "repetition p50"], rows)


def false_alarms(groups: Groups, settings: dict[str, Rules]) -> str:
    return markdown_table(
        ["rules", *groups],
        [
            [name, *(replay.alarms(records, rules) for records in groups.values())]
            for name, rules in settings.items()
        ],
    )


def low_settings() -> dict[str, Rules]:
    return {
        f"{window or 'none'}": replace(replay.DEFAULT, window=window, max_rate=1.0)
        for window in replay.WINDOWS
    }


def high_settings() -> dict[str, Rules]:
    return {name: replace(rules, min_length=0.0) for name, rules in replay.settings().items()}


def summary(found: Sequence[Verdict]) -> list[object]:
    """Detected of all, of the changed, of the unchanged, false alarms of the twins; tokens."""
    judged = [v for v in found if not v.twin_found]

    def caught(of: Sequence[Verdict]) -> Count:
        return Count(sum(v.delay is not None for v in of), len(of))

    waits = [v.delay for v in judged if v.delay is not None]
    return [
        len(found),
        len(found) - len(judged),
        caught([v for v in judged if v.changed is not None]),
        caught([v for v in judged if v.changed is None]),
        " / ".join(f"{percentile(waits, p):.0f}" for p in (0.5, 0.9, 1.0)) if waits else "-",
    ]


SUMMARY = [
    "requests",
    "set aside: alarm in the clean twin",
    "detected, answer changed",
    "detected, answer unchanged",
    "tokens to detection, p50 / p90 / max",
]


def detection(found: Sequence[Verdict]) -> str:
    rows = []
    for name, of in _split(found, _corruption):
        rows.append([name, *summary(of)])
    for name, of in sorted(_split(found, lambda v: f"all of class {v.record.group}")):
        rows.append([name, *summary(of)])
    return markdown_table(["overwritten", *SUMMARY], rows)


def by_name(groups: Groups, corrupt: Sequence[Record], twins: dict[str, Record]) -> str:
    """What `--spec-guard-rules` takes: false alarms, and detection of a whole context."""
    short = [r for name, records in groups.items() if name != "long" for r in records]
    whole = [r for r in corrupt if r.corruption is not None and r.corruption.share == 1.0]
    rows = []
    for name, rules in SETS.items():
        alarms = (replay.alarms(short, rules), replay.alarms(groups.get("long", []), rules))
        for onset, of in _split(
            replay.verdicts(whole, twins, rules), lambda v: f"100%, at {v.after}"
        ):
            rows.append([name, *alarms, onset, *summary(of)])
    head = ["rules", "clean, called anomalous", "clean and long", "overwritten"]
    return markdown_table([*head, *SUMMARY], rows)


def by_setting(corrupt: Sequence[Record], twins: dict[str, Record]) -> str:
    """All of the context overwritten, per onset: here the rules can differ."""
    rows = []
    shown = {0.0, replay.DEFAULT.repetition}
    whole = [r for r in corrupt if r.corruption is not None and r.corruption.share == 1.0]
    for name, rules in replay.settings().items():
        if rules.repetition not in shown:
            continue
        for onset, of in _split(
            replay.verdicts(whole, twins, rules), lambda v: f"100%, at {v.after}"
        ):
            rows.append([name, onset, *summary(of)])
    return markdown_table(["window / repetition", "overwritten", *SUMMARY], rows)


def by_threshold(groups: Groups, corrupt: Sequence[Record], twins: dict[str, Record]) -> str:
    """Only the low rule: what another threshold would gain and cost."""
    clean = [record for records in groups.values() for record in records]
    whole = [r for r in corrupt if r.corruption is not None and r.corruption.share == 1.0]
    rows = []
    for threshold in LENGTHS:
        rules = replace(replay.DEFAULT, min_length=threshold, max_rate=1.0)
        found = replay.verdicts(whole, twins, rules)
        rows.append([f"{threshold:g}", replay.alarms(clean, rules), *summary(found)])
    return markdown_table(["accept length below", "clean, called anomalous", *SUMMARY], rows)


def control(records: Sequence[Record], twins: dict[str, Record]) -> str:
    again = [r for r in records if r.role == "again" and r.twin is not None]
    apart = [replay.agreement(r, twins[r.twin or ""]) for r in again]
    return f"{Count(sum(a is not None for a in apart), len(apart))} differ in some token.\n"


def order(record: Record) -> tuple[float, ...]:
    """Early before late, all of the context before a part of it."""
    what = record.corruption
    return (what.after, -what.share, KINDS.index(what.kind)) if what else ()


def _corruption(verdict: Verdict) -> str:
    assert verdict.record.corruption is not None
    return verdict.record.corruption.label


def _split(
    found: Sequence[Verdict], name: Callable[[Verdict], str]
) -> Iterator[tuple[str, list[Verdict]]]:
    groups: dict[str, list[Verdict]] = {}
    for verdict in found:
        groups.setdefault(name(verdict), []).append(verdict)
    yield from groups.items()
