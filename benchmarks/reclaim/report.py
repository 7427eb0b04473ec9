"""Results as one JSON file per release, and as text."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(path: Path, release: str, part: str, result: dict[str, Any]) -> None:
    """Put one benchmark's result into the file, beside what the others left there."""
    found = json.loads(path.read_text()) if path.exists() else {"release": release}
    if found.get("release") != release:
        raise ValueError(f"{path} holds results of SGLang {found.get('release')}, not {release}")
    found[part] = {"machine": machine(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures depend on, without a name."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def throughput_table(result: dict[str, Any]) -> str:
    """One row per run, then the comparison."""
    header = ("run", "half", "requests/s", "latency ms", "server CPU ms", "client CPU ms")
    rows: list[tuple[str, ...]] = [(*header, "other cores")]
    for number, run in enumerate(result["runs"], 1):
        cpu = run["cpu_ms"]
        server = sum(ms for who, ms in cpu.items() if who != "client")
        cells = (run["requests_per_s"], run["latency_ms"], round(server, 1), cpu["client"])
        texts = (str(cell) for cell in (*cells, run["other_cores"]))
        rows.append((str(number), run["half"], *texts))
    lines = [table(rows), ""]
    for name in ("requests_per_s", "cpu_ms_per_request"):
        found = result[name]
        lines.append(
            f"{name}: stock {found['median']['stock']}, fixed {found['median']['fixed']}; "
            f"fixed/stock {found['ratio_of_medians']}; per pair {found['ratio_per_pair']}"
        )
    answers = result["answers"]
    lines.append(f"answers compared {answers['compared']}, wrong {answers['wrong']}")
    if "holds" in result:
        lines.append(f"holds: {result['holds']}")
    return "\n".join(lines)


def share_line(result: dict[str, Any]) -> str:
    return (
        f"{100 * result['share']:.2f}% of both servers' CPU time is the plugin's"
        f" ({result['ours']} of {result['samples']} samples in {result['seconds']} s of load)"
    )


def interleaved_table(result: dict[str, Any]) -> str:
    """One row per session, then the comparison over all bursts."""
    rows: list[tuple[str, ...]] = [("session", "stock requests/s", "fixed requests/s", "ratio")]
    for number, session in enumerate(result["sessions"], 1):
        rates = [
            statistics.median(run["requests_per_s"] for run in session if run["half"] == half)
            for half in ("stock", "fixed")
        ]
        ratio = result["ratio_per_session"][number - 1]
        rows.append((str(number), *(f"{rate:.2f}" for rate in rates), str(ratio)))
    title = "stock against stock, the noise of the method\n" if result["control"] else ""
    return "\n".join(
        [
            title + table(rows),
            "",
            *(
                f"{name}: fixed/stock per pair of bursts {result[name]['pairs']}, "
                f"of medians {result[name]['ratio_of_medians']}"
                for name in ("requests_per_s", "cpu_ms_per_request")
            ),
            f"cores kept busy by others: {result['other_cores']}",
            f"answers compared {result['answers']['compared']}, wrong {result['answers']['wrong']}",
        ]
    )


def holds_table(result: dict[str, Any]) -> str:
    """One row per abort, then the medians."""
    names = list(result["rounds"][0])
    rows = [tuple(name.replace("_", " ") for name in names)]
    rows += [tuple(str(hold[name]) for name in names) for hold in result["rounds"]]
    return "\n".join(
        [
            table(rows),
            "",
            f"hold minus remaining write, ms: {result['hold_minus_remaining_ms']}",
            f"back after the last byte, ms: {result['back_after_last_byte_ms']}",
            f"network round trip on the idle link, ms: {result['network_round_trip_ms']}",
        ]
    )


def ledger_table(result: dict[str, Any]) -> str:
    """Microseconds per request."""
    rows = [("us per request", *result["landed"])]
    rows += [(kind, *(str(v) for v in result[kind].values())) for kind in ("landed", "aborted")]
    return f"{table(rows)}\n\ngate, us per request: {result['gate']}"


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
