"""The tables of README and docs that are made from the package's own records and from results.

    python -m tools.reference      write them anew, between their `<!-- NAME: begin/end -->` markers

`tests/unit/test_reference.py` fails while one of them is not what the records say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.layersplit.calibration import report
from sglang_scaling_fixes.attach import FIRST_RELEASE, LAST_RELEASE, AttachPoint
from sglang_scaling_fixes.config import PLUGIN_ENV, PLUGIN_FLAG, Setting
from sglang_scaling_fixes.fix import Fix
from sglang_scaling_fixes.fixes import DEFAULT_FIXES, FIXES, SETTINGS
from sglang_scaling_fixes.layersplit.metrics import PREFILL as LAYER_SPLIT
from sglang_scaling_fixes.metrics import PLUGIN, Family, Metric
from sglang_scaling_fixes.patches import manifest
from sglang_scaling_fixes.points import ATTACH_POINTS as PLUGIN_POINTS
from sglang_scaling_fixes.reclaim.metrics import DECODE, PREFILL
from sglang_scaling_fixes.resume.metrics import RESUME
from sglang_scaling_fixes.retry.metrics import RETRY_PROXY
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD

ROOT = Path(__file__).resolve().parents[1]


def tables() -> dict[tuple[str, str], str]:
    """`{(file, name of the markers): what stands between them}`."""
    return {
        ("README.md", "fixes"): fixes_by_release(),
        ("README.md", "settings"): settings(),
        ("docs/fixes.md", "fixes"): "\n".join(fix_in_full(fix) for fix in FIXES),
        ("docs/fixes.md", "plugin"): places(PLUGIN_POINTS),
        ("docs/patches.md", "patches"): patches(),
        ("docs/safe-reclaim.md", "metrics"): metrics(DECODE, PREFILL, PLUGIN),
        ("docs/spec-guard.md", "metrics"): metrics(SPEC_GUARD),
        ("docs/layersplit.md", "metrics"): metrics(LAYER_SPLIT),
        **calibration(),
        ("docs/resume.md", "metrics"): metrics(RESUME),
        ("docs/retry-proxy.md", "metrics"): metrics(RETRY_PROXY),
    }


# -- LayerSplit's published gain -----------------------------------------------------------


def calibration() -> dict[tuple[str, str], str]:
    """Tables of the committed result: nothing is computed anew."""
    found = report.committed()
    made = (report.fits, report.parts, report.signs, report.rounds, report.warm)
    return {("docs/layersplit.md", table.__name__): table(found) for table in made}


# -- fixes ---------------------------------------------------------------------------------


def fixes_by_release() -> str:
    rows = [[f"`{fix.name}`", _asked_by(fix), fix.breaks, "; ".join(_states(fix))] for fix in FIXES]
    state = f"State from {FIRST_RELEASE} to {LAST_RELEASE}, and what stock does by itself"
    return _table(["Fix", "Armed by", "What breaks without it", state], rows)


def _asked_by(fix: Fix) -> str:
    if fix.missing:
        return "nothing"
    return f"a bare `{PLUGIN_FLAG}`, or its name" if fix.default else "its name"


def _states(fix: Fix) -> Iterator[str]:
    if fix.missing:
        yield "not in this version"
        return
    for first, does in fix.stock:
        state = "native" if first in fix.native else "armed"
        state = "unsupported" if first in fix.unsupported else state
        yield f"from {first} **{state}** ({does})"


def fix_in_full(fix: Fix) -> str:
    armed = f"`{PLUGIN_FLAG} {fix.name}`"
    if fix.default:
        armed = f"a bare `{PLUGIN_FLAG}`, or {armed}"
    families = dict.fromkeys(f"`{family.prefix}*`" for family in fix.metrics)
    rows = [
        ["Armed by", "nothing: not in this version" if fix.missing else armed],
        ["Without it", fix.breaks],
        ["What it does", fix.how],
        ["Stock by itself", "; ".join(f"from {first}: {does}" for first, does in fix.stock)],
        ["Upstream", fix.upstream],
        ["Can be removed when", fix.remove_when],
        ["Settings", ", ".join(f"`{setting.flag}`" for setting in fix.settings) or "none"],
        ["Metrics", ", ".join(families) or "none"],
    ]
    text = f"## {fix.name}\n\n" + _table(["", ""], rows)
    if fix.attach_points:
        text += "\nWhere it touches SGLang:\n\n" + places(fix.attach_points)
    return text


def places(points: Iterable[AttachPoint]) -> str:
    rows = [
        [
            f"`{point.target}`",
            {"both": "decode, prefill"}.get(point.role, point.role),
            f"{point.first} – {point.last}",
            "wrapped" if point.wrapped else "used",
        ]
        for point in points
    ]
    return _table(["Place", "Role", "Releases", ""], rows)


# -- patches -------------------------------------------------------------------------------


def patches() -> str:
    rows = [
        [
            f"`{patch.name}`",
            patch.kind,
            f"{patch.releases[0]} – {patch.releases[-1]}",
            " ".join(patch.problem.split()),
            " ".join(patch.fix.split()),
            f"{patch.cost} (`{patch.cost_command}`)" if patch.cost_command else patch.cost,
            patch.upstream,
            patch.retires,
        ]
        for patch in manifest.load().patches
    ]
    head = [
        "Patch",
        "Kind",
        "Releases",
        "Without it",
        "What it does",
        "Cost",
        "Upstream",
        "Retires",
    ]
    return _table(head, rows)


# -- settings ------------------------------------------------------------------------------


def settings() -> str:
    names = ", ".join(DEFAULT_FIXES)
    plugin = [
        f"`{PLUGIN_FLAG} [FIX,...]`",
        f"`{PLUGIN_ENV}`",
        "not armed",
        f"What to arm. Alone (in the environment: `default`): {names}.",
    ]
    return _table(
        ["Flag", "Environment", "Default", "Meaning"],
        [plugin, *([_flag(s), f"`{s.env}`", _default(s), s.help] for s in SETTINGS)],
    )


def _flag(setting: Setting) -> str:
    if setting.kind is bool:
        return f"`{setting.flag}`"
    value = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.metavar
    return f"`{setting.flag} {value}`"


def _default(setting: Setting) -> str:
    if setting.kind is bool:
        return "on" if setting.default else "off"
    return f"`{setting.default}`" if setting.default != "" else "none"


# -- metrics -------------------------------------------------------------------------------


def metrics(*families: Family) -> str:
    rows = [
        [f"`{series(family, metric)}`", metric.kind, _labels(metric), family.where, metric.help]
        for family in families
        for metric in family.metrics
    ]
    return _table(["Metric", "Kind", "Labels", "Counted by", "Meaning"], rows)


def series(family: Family, metric: Metric) -> str:
    """The name as Prometheus sees it; of a histogram, without `_bucket`, `_sum` and `_count`."""
    return family.prefix + metric.name + ("_total" if metric.kind == "counter" else "")


def _labels(metric: Metric) -> str:
    known = [dict.fromkeys(values) for values in zip(*metric.series, strict=True)]
    parts = []
    for i, label in enumerate(metric.labels):
        values = ", ".join(f"`{value}`" for value in known[i]) if known else ""
        parts.append(f"`{label}`: {values}" if values else f"`{label}`")
    return "; ".join(parts)


# -- files ---------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def between(text: str, name: str) -> str:
    """What stands between the markers of `name`. ValueError where they are not there, once each."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin.strip()} and {end.strip()} once each, in this order")
    return text.partition(begin)[2].partition(end)[0]


def renewed(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    return text.replace(begin + between(text, name) + end, begin + table + end)


def main() -> None:
    for (file, name), table in tables().items():
        path = ROOT / file
        path.write_text(renewed(path.read_text(), name, table))


if __name__ == "__main__":
    main()
