"""The report over all releases: hazard by release, stock and with our fixes, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sglang_scaling_fixes import racecheck
from sglang_scaling_fixes.errors import ScalingFixesError

Reports = dict[tuple[str, str], dict[str, Any]]

_HEAD = """# HiCache ordering, release by release

Written by `sglang-scaling-fixes racecheck --matrix docs/hicache-matrix.md`; do not edit.

Each cell is one check on a CPU: the release's own pools, host pools, controllers and transfer
workers, run from its wheel's source on recording streams. A number is on how many buffers (one
per layer and kind) two accesses were found that nothing orders, **stock → with the fixes**,
`hicache-ordering`, `early-send-ordering` and `layer-split`.
`ok` is ordered, `–` means that what the hazard is about is not there, `refused` that an armed
server does not start with that combination. `layersplit-prefetch-before-load` and
`layersplit-read-before-load` are of stock's LayerSplit, the other `layersplit` hazards of the pool
of `layer-split`. What a check sees and what it takes for granted is in
[hicache-ordering.md](hicache-ordering.md).
"""


def build(
    releases: tuple[str, ...] = racecheck.RELEASES, progress: Callable[[str], None] = print
) -> str:
    """Check every release twice and return the document."""
    wanted = [(release, fixes) for release in releases for fixes in ("off", "on")]

    def one(key: tuple[str, str]) -> dict[str, Any]:
        try:
            report = racecheck.check(*key)
        except ScalingFixesError as error:
            report = {"error": str(error), "hazards": []}
        progress(f"racecheck: {key[0]}, fixes {key[1]}")
        return report

    with ThreadPoolExecutor(2) as pool:
        return render(dict(zip(wanted, pool.map(one, wanted), strict=True)))


def render(reports: Reports) -> str:
    """The document for these reports, keyed by release and `"off"` or `"on"`."""
    releases = list(dict.fromkeys(release for release, _ in reports))
    names = list(dict.fromkeys(h["name"] for r in reports.values() for h in r["hazards"]))
    lines = [_HEAD, "| Release | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    for release in releases:
        stock, fixed = (_by_name(reports[release, fixes]) for fixes in ("off", "on"))
        cells = [_cell(stock.get(name), fixed.get(name)) for name in names]
        lines.append(f"| {release} | " + " | ".join(cells) + " |")
    lines += ["", "## How each row was obtained", "", "| Release | With the fixes |", "|---|---|"]
    for release in releases:
        report = reports[release, "on"]
        lines.append(f"| {release} | {report.get('proof') or report.get('error')} |")
    return "\n".join(lines) + "\n"


def _by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {hazard["name"]: hazard for hazard in report["hazards"]}


def _cell(stock: dict[str, Any] | None, fixed: dict[str, Any] | None) -> str:
    before, after = _word(stock), _word(fixed)
    return before if before == after else f"{before} → {after}"


def _word(hazard: dict[str, Any] | None) -> str:
    if hazard is None or "broken" in hazard:
        return "?"
    if hazard["verdict"] == "race":
        return f"**{hazard['races']}**"
    if hazard["verdict"] == "ordered":
        return "ok"
    return "refused" if hazard["reason"].startswith("refused") else "–"
