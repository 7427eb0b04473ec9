"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sglang_scaling_fixes.layersplit.planner.layout import (
    assumptions,
    formulas,
    section,
    table,
    wrapped,
)


def text(plan: dict[str, Any]) -> str:
    """Every section names what its figures are."""
    given = {name: one["value"] for name, one in plan["assumptions"].items()}
    lines = [
        f"{given['model']}, {given['ranks']} ranks, {given['kv_bytes']} + {given['index_bytes']} B "
        f"a token and layer, draft layer: {given['mtp']}",
        "Nothing here is measured. What is modelled rests on the assumptions below.",
        *section("Capacity (modelled)", _capacity(plan)),
        *section("GB of one forward, ms of one request (modelled)", _traffic(plan["rows"])),
        *section(
            "Contexts held, and gain of ours (modelled; held and speed are not to be multiplied)",
            _gain(plan["rows"]),
        ),
        *section("Layers of the first forward, ms (modelled)", _layers(plan["rows"])),
        *section("Published capacities, and this planner's", _published(plan["published"])),
        *section("Assumptions", assumptions(plan["assumptions"])),
        *section("Formulas", wrapped(formulas(plan))),
        *section("Left out", wrapped(plan["left_out"])),
    ]
    return "\n".join(lines)


def _capacity(plan: dict[str, Any]) -> list[str]:
    tokens, scratch = plan["capacity_tokens"], plan["scratch"]
    one = tokens["unsplit"]
    rows = [
        [name, f"{count:,}", f"{count / one:.2f}x" if one else "-"]
        for name, count in tokens.items()
    ]
    return [
        *table(["pool", "tokens", "of unsplit"], rows),
        f"two scratches of {scratch['rows']:,} tokens: {scratch['bytes'] / 1e9:.2f} GB on a rank",
    ]


def _traffic(rows: Iterable[dict[str, Any]]) -> list[str]:
    head = ["context", "prefix", "forwards", "GB: upstream", "ours"]
    head += ["compute ms", "exposed: upstream", "ours"]
    return table(
        head,
        [
            [
                f"{row['context']:,}",
                f"{row['prefix_tokens']:,}",
                str(row["forwards"]),
                *(f"{row['bytes_per_forward'][who] / 1e9:,.2f}" for who in ("upstream", "ours")),
                f"{row['compute_ms']:,.1f}",
                *(f"{row['exposed_ms'][who]:,.2f}" for who in ("upstream", "ours")),
            ]
            for row in rows
        ],
    )


def _gain(rows: Iterable[dict[str, Any]]) -> list[str]:
    head = ["context", "unsplit", "upstream", "ours"]
    head += ["held/unsplit", "speed", "held/upstream", "speed"]
    return table(
        head,
        [
            [
                f"{row['context']:,}",
                *(str(row["contexts_held"][who]) for who in ("unsplit", "upstream", "ours")),
                *(
                    _times(row["gain"][over][what])
                    for over in ("over_unsplit", "over_upstream")
                    for what in ("contexts_held", "request_speed")
                ),
            ]
            for row in rows
        ],
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}x"


def _layers(rows: Iterable[dict[str, Any]]) -> list[str]:
    head = [
        "context",
        "layers",
        "compute",
        "upstream: hidden",
        "exposed",
        "ours: hidden",
        "exposed",
    ]
    return table(
        head,
        [
            [
                f"{row['context']:,}",
                f"{run['first']}-{run['last']}"
                if run["last"] > run["first"]
                else f"{run['first']}",
                f"{run['compute_ms']:.3f}",
                *(
                    f"{run[who][what]:.3f}"
                    for who in ("upstream", "ours")
                    for what in ("hidden_ms", "exposed_ms")
                ),
            ]
            for row in rows
            for run in row["layers"]
        ],
    )


def _published(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            one["figure"].rpartition(".")[2],
            f"{one['tokens']:,}",
            f"{one['modelled_tokens']:,}",
            f"{100 * (one['modelled_over_published'] - 1):+.2f}%",
        ]
        for one in found
    ]
    source = f"{found[0]['by']} ({found[0]['flags']})"
    return [*table(["pool", "published", "modelled", "apart"], rows), *wrapped([source])]
