"""Accept length and rate of requests whose KV is overwritten while they run, beside clean ones.

    python -m benchmarks.acceptance        # prints a table, writes docs/accept-length.svg

One server with speculative decoding; requests one after the other, each twice: clean,
and with part of its context overwritten once 100 tokens are there. Streamed, so that the accept
length is seen per window of tokens and not as the average of a lifetime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.common.reports import markdown_table
from benchmarks.common.svg import text
from sglang_scaling_fixes.console import say
from sglang_scaling_fixes.lab import runtime
from sglang_scaling_fixes.lab.faults.corrupt import KINDS
from sglang_scaling_fixes.lab.install import install
from sglang_scaling_fixes.lab.servers.pending import greedy
from sglang_scaling_fixes.lab.servers.serve import RELEASE, Options, Served, prompt, serving

FIGURE = ROOT / "docs" / "accept-length.svg"
AFTER, TOKENS, WINDOW = 100, 260, 20
PROMPT = 450
SHARES = (1.0, 0.5, 0.1)


@dataclass(frozen=True)
class Curve:
    """One request: tokens generated and verifications made, at each chunk of its stream."""

    steps: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    drafts: int  # drafted tokens in a verification

    def accept_length(self, first: int, last: int) -> float:
        """Tokens per verification between two counts of tokens."""
        inside = [step for step in self.steps if first <= step[0] <= last]
        (tokens, verified), (more, again) = inside[0], inside[-1]
        return (more - tokens) / max(again - verified, 1)

    def accept_rate(self, first: int, last: int) -> float:
        """Share of drafted tokens that were accepted: a verification gives one token besides."""
        return (self.accept_length(first, last) - 1) / self.drafts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance", description=__doc__)
    parser.add_argument("--prompts", type=int, default=2, help="of each kind (default 2)")
    parser.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE")
    args = parser.parse_args(argv)
    environment = install(RELEASE, say)
    options = Options(spec=True, env={runtime.CORRUPT: "1"})
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(options, environment, Path(folder)) as served,
    ):
        curves = measure(served, args.prompts)
    print(table(curves))
    args.figure.write_text(figure(curves))
    say(f"{args.figure.name} written")
    return 0


def measure(served: Served, prompts: int) -> dict[str, list[Curve]]:
    curves: dict[str, list[Curve]] = {}
    for seed in range(prompts):
        curves.setdefault("clean", []).append(stream(served, seed, f"clean:{seed}"))
        for kind in KINDS:
            for share in SHARES:
                name = f"{kind}, {share:.0%}"
                rid = f"corrupt:{kind}:{share}:{AFTER}:{seed}"
                curves.setdefault(name, []).append(stream(served, seed, rid))
    return curves


def stream(served: Served, seed: int, rid: str) -> Curve:
    payload: dict[str, Any] = {
        **greedy(prompt(PROMPT, seed=1000 + seed), TOKENS),
        "rid": rid,
        "stream": True,
    }
    # Stock keeps overwritten KV in its radix tree, and would serve the next request from it.
    flushed = served.servers[0].post("/flush_cache", {})
    assert flushed.status == 200, flushed.body
    body = str(served.servers[0].post("/generate", payload).body)
    chunks = [json.loads(line[5:]) for line in body.splitlines() if line.startswith("data: {")]
    # The first chunk is prefill's token, each further one what a verification accepted.
    steps = [(chunk["meta_info"]["completion_tokens"], n) for n, chunk in enumerate(chunks)]
    last = chunks[-1]["meta_info"]
    assert last["spec_verify_ct"] == len(chunks) - 1
    drafts = last["spec_num_proposed_drafts"] // last["spec_verify_ct"]
    return Curve(tuple(steps), tuple(chunks[-1]["output_ids"]), drafts)


def table(curves: dict[str, list[Curve]]) -> str:
    """Markdown: before the corruption, in the 100 tokens after, and to the end."""
    clean = curves["clean"]
    head = [
        "context overwritten", "accept length before", "next 100 tokens", "rate", "tokens changed"
    ]  # fmt: skip
    rows = []
    for name, runs in curves.items():
        before, after = (
            statistics.mean(run.accept_length(*span) for run in runs)
            for span in ((1, AFTER), (AFTER, AFTER + 100))
        )
        rate = statistics.mean(run.accept_rate(AFTER, AFTER + 100) for run in runs)
        changed = statistics.mean(
            sum(a != b for a, b in zip(run.ids, base.ids, strict=True)) / TOKENS
            for run, base in zip(runs, clean, strict=True)
        )
        rows.append([name, f"{before:.2f}", f"{after:.2f}", f"{rate:.2f}", f"{changed:.0%}"])
    return markdown_table(head, rows)


def figure(curves: dict[str, list[Curve]]) -> str:
    """An SVG of the mean accept length per window, clean beside all of the context gone."""
    shown = {"clean": "#1b7837", **{f"{kind}, 100%": colour for kind, colour in
             zip(KINDS, ("#762a83", "#d6604d", "#4393c3"), strict=True)}}  # fmt: skip
    width, height, left, top = 640, 300, 50, 20
    across, down = width - left - 130, height - top - 45

    def place(token: float, length: float) -> str:
        return f"{left + across * token / TOKENS:.1f},{top + down * (1 - (length - 1) / 3):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for length in (1.0, 2.0, 3.0, 4.0):
        (x, y), (far, _) = (place(t, length).split(",") for t in (0, TOKENS))
        parts.append(f'<line x1="{x}" y1="{y}" x2="{far}" y2="{y}" stroke="#bbb"/>')
        parts.append(text(left - 8, float(y) + 4, f"{length:g}", 'text-anchor="end"'))
    x, low = place(AFTER, 1).split(",")
    parts.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{low}" stroke="#888"/>')
    parts.append(text(float(x) + 4, top + 10, "overwritten"))
    ends = range(WINDOW + 1, TOKENS + 1, WINDOW // 2)
    for row, (name, colour) in enumerate(shown.items()):
        means = [
            statistics.mean(run.accept_length(end - WINDOW, end) for run in curves[name])
            for end in ends
        ]
        points = " ".join(
            place(end - WINDOW / 2, length) for end, length in zip(ends, means, strict=True)
        )
        line = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(f'<polyline {line} points="{points}"/>')
        parts.append(text(width - 122, top + 20 + 18 * row, name, f'fill="{colour}"'))
    centre = 'text-anchor="middle"'
    parts.append(text(left + across / 2, height - 10, "tokens generated", centre))
    parts.append(text(12, top - 6, "accept length") + "</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
