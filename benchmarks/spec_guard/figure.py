"""A recording as an SVG: accept lengths, clean and corrupt, and how soon corruption is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.common.svg import text
from benchmarks.spec_guard import replay
from benchmarks.spec_guard.recording import DRAFTS, Record, Recording
from benchmarks.spec_guard.report import clean_groups
from sglang_scaling_fixes.specguard.detector import Rules

PANEL_W, PANEL_H = 380, 250
LEFT, TOP, GAP = 56, 44, 76
LEGEND_TOP, LEGEND_STEP = 52, 18  # below a panel's axis; px
MOST_TOKENS = 300
"""Tokens since the corruption that the second panel shows, and about what is recorded of them."""

CLEAN = ("#1b7837", "#5aae61", "#2166ac", "#67a9cf", "#555555")
CORRUPT = {1.0: "#b2182b", 0.5: "#ef8a62", 0.1: "#c9a227"}
ONSETS = ("#b2182b", "#762a83", "#e08214", "#35978f")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a panel, named in the legend below it."""

    label: str
    colour: str
    points: Points
    dash: str = ""


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with a grid line at each tick."""

    name: str
    low: float
    high: float
    ticks: Sequence[float]


def figure(recording: Recording, rules: Rules = replay.DEFAULT) -> str:
    share = Axis("share of requests", 0, 1, (0, 0.25, 0.5, 0.75, 1))
    first = Axis("accept length", 1, DRAFTS + 1, (1, 1.5, 2, 2.5, 3, 3.5, 4))
    second = Axis(
        "tokens generated since the corruption",
        0,
        MOST_TOKENS,
        range(0, MOST_TOKENS + 1, 50),
    )
    marks = [
        (rules.min_length, f"below {rules.min_length:g}: low", "start"),
        (1 + DRAFTS * rules.max_rate, f"rate above {rules.max_rate:g}: high", "end"),
    ]
    lengths, waits = accept_lengths(recording), detections(recording, rules)
    rows = max(-(-len(lengths) // 2), len(waits))
    width = 2 * PANEL_W + LEFT + GAP + 24
    height = TOP + PANEL_H + LEGEND_TOP + rows * LEGEND_STEP + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *panel(
            LEFT,
            "Requests with at most this accept length",
            (first, share),
            lengths,
            columns=2,
            marks=marks,
        ),
        *panel(
            LEFT + PANEL_W + GAP,
            "All of the context overwritten: detected by then",
            (second, share),
            waits,
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def accept_lengths(recording: Recording) -> list[Curve]:
    """Cumulative: clean requests whole, corrupt ones from their corruption on."""
    curves = [
        Curve(f"clean {name}", colour, cumulative([r.accept_length for r in records]))
        for (name, records), colour in zip(
            clean_groups(recording.records).items(), CLEAN, strict=False
        )
    ]
    for share, colour in CORRUPT.items():
        of = [
            since(r, r.corruption.after)
            for r in recording.records
            if r.corruption is not None and r.corruption.share == share
        ]
        if of:
            curves.append(Curve(f"{share:.0%} overwritten", colour, cumulative(of), "6 3"))
    return curves


def since(record: Record, after: int) -> float:
    """Accept length of the verifications past the first `after` tokens."""
    tokens, accepted, count = 1, 0, 0
    for digit in map(int, record.accepted):
        if tokens > after:
            accepted += digit
            count += 1
        tokens += 1 + digit
    return 1 + accepted / max(count, 1)


def cumulative(values: Sequence[float]) -> Points:
    """Steps up: (value, share of the values up to it)."""
    points: Points = [(1.0, 0.0)]
    for number, value in enumerate(sorted(values), start=1):
        points += [(value, points[-1][1]), (value, number / len(values))]
    return [*points, (DRAFTS + 1.0, 1.0)] if values else points


def detections(recording: Recording, rules: Rules) -> list[Curve]:
    """With all of the context overwritten, per onset; without and with the window."""
    twins = {r.name: r for r in recording.records if r.role in {"twin", "long"}}
    whole = [r for r in recording.records if r.corruption is not None and r.corruption.share == 1.0]
    curves = []
    onsets = sorted({r.corruption.after for r in whole if r.corruption is not None})
    for onset, colour in zip(onsets, ONSETS, strict=False):
        own = [r for r in whole if r.corruption is not None and r.corruption.after == onset]
        for window, dash in ((rules.window, ""), (0, "3 3")):
            judged = [
                v
                for v in replay.verdicts(own, twins, replace(rules, window=window))
                if not v.twin_found
            ]
            if judged:
                kind = f"window of {window}" if window else "whole life only"
                curves.append(
                    Curve(f"overwritten after {onset} tokens, {kind}", colour, found(judged), dash)
                )
    return curves


def found(judged: Sequence[replay.Verdict]) -> Points:
    """Steps up: (tokens since the corruption, share found by then), to the end of the record."""
    end = min(MOST_TOKENS, *(len(v.record.ids) - v.after for v in judged))
    waits = sorted(v.delay for v in judged if v.delay is not None and v.delay <= end)
    points: Points = [(0.0, 0.0)]
    for number, wait in enumerate(waits, start=1):
        points += [(wait, points[-1][1]), (wait, number / len(judged))]
    return [*points, (end, points[-1][1])]


def panel(
    left: float,
    title: str,
    axes: tuple[Axis, Axis],
    curves: Sequence[Curve],
    *,
    columns: int = 1,
    marks: Sequence[tuple[float, str, str]] = (),
) -> list[str]:
    """One plot with its legend below. Marks: where on the first axis, what, anchored how."""
    across, up = axes

    def x(value: float) -> float:
        return left + PANEL_W * (value - across.low) / (across.high - across.low)

    def y(value: float) -> float:
        return TOP + PANEL_H * (1 - (value - up.low) / (up.high - up.low))

    bottom = TOP + PANEL_H
    middle = 'text-anchor="middle"'
    parts = [text(left, 16, title, 'font-weight="bold"')]
    for tick in up.ticks:
        parts.append(line((left, y(tick)), (left + PANEL_W, y(tick)), "#ddd"))
        parts.append(text(left - 7, y(tick) + 4, f"{tick:.0%}", 'text-anchor="end"'))
    for tick in across.ticks:
        parts.append(line((x(tick), bottom), (x(tick), bottom + 4), "#888"))
        parts.append(text(x(tick), bottom + 17, f"{tick:g}", middle))
    parts.append(text(left + PANEL_W / 2, bottom + 33, across.name, middle))
    for value, name, anchor in marks:
        parts.append(line((x(value), TOP - 6), (x(value), bottom), "#000", "2 2"))
        parts.append(text(x(value), TOP - 10, name, f'text-anchor="{anchor}" font-size="11"'))
    for curve in curves:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve.points)
        dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        parts.append(
            f'<polyline fill="none" stroke="{curve.colour}" stroke-width="2"{dash}'
            f' points="{points}"/>'
        )
    rows = -(-len(curves) // columns)
    for number, curve in enumerate(curves):
        at = left + (number // rows) * PANEL_W / columns
        level = bottom + LEGEND_TOP + (number % rows) * LEGEND_STEP
        parts.append(line((at, level - 4), (at + 24, level - 4), curve.colour, curve.dash, 2))
        parts.append(text(at + 30, level, curve.label))
    return parts


def line(
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    dash: str = "",
    width: int = 1,
) -> str:
    (x1, y1), (x2, y2) = start, end
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"'
        f' stroke-width="{width}"{dashes}/>'
    )
