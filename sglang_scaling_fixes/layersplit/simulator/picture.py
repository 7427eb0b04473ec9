"""A replay as an SVG picture: for each pool its tokens, its hits and its goodput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 900, 330, 24
TOP, BOTTOM = 100, 262
"""Where bars end at most, and where they stand."""
COLOURS = {"unsplit": "#8d8d8d", "upstream": "#d08a2e", "ours": "#2f6fb0"}
LOADED = "#b9d3ea"
"""What came from the host, on top of the pool's hits."""


def svg(found: dict[str, Any]) -> str:
    """Of `simulate.run`'s JSON."""
    pools, trace = found["pools"], found["trace"]
    loads = [pool["loaded_rate"] or 0.0 for pool in pools]
    said = (
        f"{trace['file']}: {trace['requests']:,} requests, prompts of "
        f"{trace['mean_prompt_tokens']:,.0f} tokens on average"
    )
    panels = (
        Panel("pool, million tokens", "{:.2f}", [pool["capacity_tokens"] / 1e6 for pool in pools]),
        Panel(
            "hits, and loaded from the host (light)" if any(loads) else "hits in the pool",
            "{:.1%}",
            [pool["hit_rate"] or 0.0 for pool in pools],
            loads,
        ),
        Panel(
            "goodput, thousand tokens/s",
            "{:.1f}",
            [pool["goodput_tokens_s"] / 1e3 for pool in pools],
        ),
    )
    endless = f"an endless pool would find {trace['reuse']:.1%} of the tokens"
    body = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(MARGIN, 28, said, 'font-size="15" font-weight="bold"'),
        _text(MARGIN, 48, "modelled by layersplit simulate; nothing here is measured"),
        _text(MARGIN, HEIGHT - 14, endless),
    ]
    width = (WIDTH - 2 * MARGIN) / len(panels)
    names = [pool["name"] for pool in pools]
    for number, panel in enumerate(panels):
        body += _drawn(panel, names, MARGIN + number * width, width - 2 * MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n' + "\n".join(body) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class Panel:
    """One bar for each pool, and `above` on it, if there is any. The highest is as high as may be.

    `shape`: how a bar's whole value is written.
    """

    title: str
    shape: str
    values: Sequence[float]
    above: Sequence[float] = ()


def _drawn(panel: Panel, names: Sequence[str], left: float, width: float) -> list[str]:
    above = panel.above or [0.0] * len(names)
    most = max(*map(sum, zip(panel.values, above, strict=True)), 1e-9)
    slot = width / len(names)
    lines = [_text(left, TOP - 26, panel.title, 'font-weight="bold"')]
    for number, (name, value, more) in enumerate(zip(names, panel.values, above, strict=True)):
        x, bar = left + slot * number, slot * 0.7
        height, extra = ((BOTTOM - TOP) * part / most for part in (value, more))
        lines += [
            _bar(x, BOTTOM - height, bar, height, COLOURS[name]),
            _bar(x, BOTTOM - height - extra, bar, extra, LOADED),
            _text(x, BOTTOM - height - extra - 4, panel.shape.format(value + more)),
            _text(x, BOTTOM + 18, name),
        ]
    lines.append(
        f'<line x1="{left:.1f}" y1="{BOTTOM}" x2="{left + width:.1f}" y2="{BOTTOM}" '
        'stroke="#444444"/>'
    )
    return lines


def _bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
    )


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
