"""The calibration as a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.reports import markdown_table

RESULTS = Path(__file__).parents[1] / "results"


def text(found: dict[str, Any]) -> str:
    """Every table says what is fitted, what is published and what is predicted."""
    return "\n".join(
        [
            "# LayerSplit's published gain, as a fit",
            "",
            f"`python -m benchmarks.layersplit.calibration`, {found['date']}; "
            f"trace `{found['trace']}`. Modelled throughout: nothing was measured.",
            "",
            "## Fits",
            "",
            "Gain: goodput of ours over no split's. Two numbers are published, and one or two are "
            "fitted: a fit shows that a mechanism can, not that it did. Published: "
            + ", ".join(f"{gain:.2f} at {_k(c)}" for c, gain in _ends(found))
            + ". 80K is not published: each fit predicts it.",
            "",
            fits(found),
            "## What would tell them apart",
            "",
            "Of the pool without a split, at the fit.",
            "",
            signs(found),
            "## Which part makes the gain",
            "",
            "Goodput over no split's: with the part alone, and with all of ours but the part.",
            "",
            *[_ablation(fit) for fit in found["fits"]],
            "## Against #29930",
            "",
            "Fitted: clients, to the hits without a split. Set: TFLOP/s, to its prefill speed. "
            "Predicted: the rest.",
            "",
            rounds(found),
            "## Against pegaflow",
            "",
            "Throughput with warm KV over cold: a whole server there, prefill's compute here.",
            "",
            warm(found),
        ]
    )


def _ends(found: dict[str, Any]) -> list[tuple[int, float]]:
    return [(int(context), gain) for context, gain in found["published"]["gain"].items()]


def committed() -> dict[str, Any]:
    """The figures in results/calibration.json."""
    found = json.loads((RESULTS / "calibration.json").read_text())
    assert isinstance(found, dict)
    return found


def fits(found: dict[str, Any]) -> str:
    """What was fitted, the gain by context, and what is left at the published ends."""
    rows = []
    for fit in found["fits"]:
        contexts = fit["contexts"]
        low, high = next(iter(fit["spread"].values()))
        rows.append(
            [
                fit["mechanism"],
                f"{fit['fitted']}: {_setting(fit)}",
                *(f"{one['gain']:.2f}" for one in contexts.values()),
                *(
                    f"{100 * (contexts[str(context)]['gain'] / gain - 1):+.0f}%"
                    for context, gain in _ends(found)
                ),
                f"{low:.2f} to {high:.2f}",
            ]
        )
    head = ["Mechanism", "Fitted", *map(_k, map(int, found["fits"][0]["contexts"]))]
    head += [f"residual {_k(context)}" for context, _ in _ends(found)]
    return markdown_table([*head, "120K with other orders"], rows)


def _setting(fit: dict[str, Any]) -> str:
    """What was turned; the other settings are the same for all candidates."""
    setting = fit["setting"]
    second = {
        "hits, speed too": f", {setting['tflops']:g}",
        "loads": f", {(setting['load'] or 0) / 1e9:g}",
        "held": f", {setting['hold'] * 1e6:g}",
    }
    return f"{setting['live']}{second.get(fit['mechanism'], '')}"


def signs(found: dict[str, Any]) -> str:
    """What a server without a split would show, if the mechanism were the right one."""
    rows = [
        [
            fit["mechanism"],
            _k(int(context)),
            f"{one['unsplit']['prompt']:,.0f} ({one['ours']['prompt']:,.0f})",
            f"{one['gain']:.2f}",
            f"{one['unsplit']['hits']:.0%} ({one['ours']['hits']:.0%})",
            f"{one['unsplit']['loaded']:.0%} ({one['ours']['loaded']:.0%})",
            f"{one['unsplit']['held']} ({one['ours']['held']})",
        ]
        for fit in found["fits"]
        for context, one in fit["contexts"].items()
    ]
    head = [
        "Mechanism",
        "Context",
        "Mean prompt (ours)",
        "Gain",
        "Hits in the pool (ours)",
        "Loaded (ours)",
    ]
    return markdown_table([*head, "Requests that hold KV, at most (ours)"], rows)


def parts(found: dict[str, Any]) -> str:
    """Goodput over no split's at the longest context: with a part alone; with all but it."""
    taken = {fit["mechanism"]: list(fit["ablation"].values())[-1] for fit in found["fits"]}
    names = list(next(iter(taken.values())))
    rows = [
        [name, *("; ".join(f"{value:.2f}" for value in one[name]) for one in taken.values())]
        for name in names
    ]
    longest = _k(int(list(found["fits"][0]["ablation"])[-1]))
    return markdown_table([f"{longest}: the part alone; all but it", *taken], rows)


def _ablation(fit: dict[str, Any]) -> str:
    contexts = fit["ablation"]
    parts = list(next(iter(contexts.values())))
    head = [f"{fit['mechanism']}: part"]
    head += [f"{_k(int(c))} {how}" for c in contexts for how in ("alone", "all but it")]
    rows = [
        [part, *(f"{value:.2f}" for one in contexts.values() for value in one[part])]
        for part in parts
    ]
    return markdown_table(head, rows)


def rounds(found: dict[str, Any]) -> str:
    """#29930's conversation: published, and played."""
    told = found["published"]["rounds"]
    rows = [
        [
            "published",
            "?",
            "",
            f"{_hits(told['hits_unsplit'])}; {_hits(told['hits_split'])}",
            f"{told['ttft_unsplit']:.1f}",
            f"{told['ttft_split']:.1f}",
            "",
            f"{told['ttft_unsplit'] / told['ttft_split']:.2f}",
        ]
    ]
    for one in found["rounds"]:
        pools = [one[name] for name in ("unsplit", "upstream", "ours")]
        over = [
            "; ".join(f"{pools[0][which] / pool[which]:.2f}" for which in ("mean", "worst"))
            for pool in pools[1:]
        ]
        rows.append(
            [
                f"{one['clients']} clients, {one['turn']:,} tokens a round",
                f"{one['tflops']:.0f}",
                f"{one['error']:.3f}",
                f"{_hits(one['unsplit']['hits'])}; {_hits(one['ours']['hits'])}",
                *(f"{pool['mean']:.1f} to {pool['worst']:.1f}" for pool in pools),
                f"{over[0]} (ours {over[1]})",
            ]
        )
    head = ["", "TFLOP/s", "hits' residual", "hits by round: no split; split"]
    head += ["TTFT s, mean to worst: no split", "split as upstream's", "as ours"]
    return markdown_table([*head, "ratio of means; of worst"], rows)


def warm(found: dict[str, Any]) -> str:
    """pegaflow's ratio, and that of prefill's compute."""
    rows = [["published", f"{found['published']['warm_over_cold']:.2f}"]]
    rows += [
        [f"prefill's compute, {_k(int(context))}, nine tenths found", f"{ratio:.2f}"]
        for context, ratio in found["warm_over_cold"].items()
    ]
    return markdown_table(["", "warm over cold"], rows)


def _hits(shares: list[float]) -> str:
    return ", ".join(f"{share:.2f}" for share in shares)


def _k(context: int) -> str:
    return f"{context // 1000}K"
