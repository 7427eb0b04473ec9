"""A replay as text."""

from __future__ import annotations

from typing import Any

from sglang_scaling_fixes.layersplit.planner.layout import (
    assumptions,
    formulas,
    section,
    table,
    wrapped,
)


def text(found: dict[str, Any]) -> str:
    """Every section names what its figures are."""
    trace = found["trace"]
    lines = [
        f"{trace['file']} ({trace['format']}): {trace['requests']:,} requests, "
        f"{trace['sessions']:,} sessions",
        f"prompts of {trace['mean_prompt_tokens']:,.0f} tokens on average, "
        f"{trace['longest_prompt_tokens']:,} at most; "
        f"{trace['reuse']:.1%} of their tokens came before",
        "Nothing here is measured: no model ran. What is modelled rests on rules and assumptions.",
        *section("Pools (modelled)", _pools(found["pools"])),
        *section("Requests (modelled)", _requests(found["pools"])),
        *section("Seconds of the GPUs (modelled)", _seconds(found["pools"])),
        *section("Gain of ours (modelled)", _gain(found["gain"])),
        *section("Assumptions", assumptions(found["assumptions"])),
        *section("Rules", wrapped(found["rules"])),
        *section("Formulas", wrapped(formulas(found))),
        *section("Left out", wrapped(found["left_out"])),
    ]
    return "\n".join(lines)


def _pools(pools: list[dict[str, Any]]) -> list[str]:
    head = ["pool", "tokens", "contexts held", "hits", "loaded", "goodput tok/s", "tok per busy s"]
    return table(
        head,
        [
            [
                pool["name"],
                f"{pool['capacity_tokens']:,}",
                f"{pool['contexts_held']:,}",
                _percent(pool["hit_rate"]),
                _percent(pool["loaded_rate"]),
                f"{pool['goodput_tokens_s']:,.0f}",
                f"{pool['busy_tokens_s']:,.0f}",
            ]
            for pool in pools
        ],
    )


def _requests(pools: list[dict[str, Any]]) -> list[str]:
    head = ["pool", "answered", "late", "refused", "most held"]
    head += ["TTFT s: mean", "p50", "p99", "max"]
    return table(
        head,
        [
            [
                pool["name"],
                *(f"{pool['requests'][name]:,}" for name in ("answered", "late", "refused")),
                f"{pool['most_held']:,}",
                *(
                    _or_dash(pool["ttft_s"][name], "{:,.2f}")
                    for name in ("mean", "p50", "p99", "max")
                ),
            ]
            for pool in pools
        ],
    )


def _seconds(pools: list[dict[str, Any]]) -> list[str]:
    head = ["pool", "span", "compute", "exposed: broadcast", "load", "idle", "passes"]
    names = ("compute", "exposed_broadcast", "exposed_load", "idle")
    return table(
        head,
        [
            [
                pool["name"],
                f"{pool['span_s']:,.1f}",
                *(f"{pool['gpu_s'][name]:,.1f}" for name in names),
                f"{pool['passes']:,}",
            ]
            for pool in pools
        ],
    )


def _gain(gain: dict[str, dict[str, float | None]]) -> list[str]:
    head = ["over", "tokens", "goodput", "tok per busy s"]
    return table(
        head,
        [
            [name.removeprefix("over_"), *(_or_dash(one, "{:.3f}x") for one in ratios.values())]
            for name, ratios in gain.items()
        ],
    )


def _percent(share: float | None) -> str:
    return _or_dash(share, "{:.1%}")


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
