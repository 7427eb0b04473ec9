"""Results as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.reports import table

RESULTS = Path(__file__).parent / "results"


def throughput_table(result: dict[str, Any]) -> str:
    """One row per session, then the comparison over all turns."""
    rows: list[tuple[str, ...]] = [
        ("session", "stock requests/s", "fixed requests/s", "fixed/stock", "CPU", "other cores")
    ]
    for number, session in enumerate(result["sessions"], 1):
        stock, fixed = session["stock"], session["fixed"]
        rates = (f"{half['requests_per_s']:.2f}" for half in (stock, fixed))
        cpu = f"{fixed['server_cpu_ms'] / stock['server_cpu_ms']:.4f}"
        found = (f"{session['ratio']:.4f}", cpu, str(session["other_cores"]))
        rows.append((str(number), *rates, *found))
    ratio, between, answers = result["ratio"], result["ratio_over_sessions"], result["answers"]
    lines = [
        "stock against stock, the noise of the method\n" if result["control"] else "",
        table(rows),
        "",
        f"requests/s, fixed/stock over all turns: {ratio['value']} "
        f"(95% from blocks of turns: {ratio['from']} to {ratio['to']}; from sessions: "
        f"{between['from']} to {between['to']})",
        f"per session: {result['ratio_per_session']}",
        f"server CPU time per request, fixed/stock per session: {result['cpu_ratio_per_session']}",
        f"answers compared {answers['compared']}, wrong {answers['wrong']}",
    ]
    if "holds" in result:
        lines.append(f"holds: {result['holds']}")
    return "\n".join(filter(None, lines))


def share_line(result: dict[str, Any]) -> str:
    return (
        f"{100 * result['share']:.2f}% of both servers' CPU time is the plugin's"
        f" ({result['ours']} of {result['samples']} samples in {result['seconds']} s of load)"
    )


def holds_table(result: dict[str, Any]) -> str:
    """One row per abort, then the medians."""
    return "\n".join(
        [
            _of(result["rounds"]),
            "",
            f"hold minus remaining write, ms: {result['hold_minus_remaining_ms']}",
            f"back after the last byte, ms: {result['back_after_last_byte_ms']}",
            f"network round trip on the idle link, ms: {result['network_round_trip_ms']}",
        ]
    )


def memory_line(result: dict[str, Any]) -> str:
    entries = sum(result["largest"].values())
    return (
        f"{result['requests']} requests: {result['rss_mib'][-1]} MiB in the end, "
        f"{result['growth_mib']:+} MiB since 40% of them; {entries} entries at most"
    )


def storm_table(result: dict[str, Any]) -> str:
    """One row for each size of storm."""
    return _of(result["storms"])


def _of(records: list[dict[str, Any]]) -> str:
    """One row for each record, headed by its keys."""
    names = list(records[0])
    rows = [tuple(name.replace("_", " ") for name in names)]
    return table(rows + [tuple(str(record[name]) for name in names) for record in records])


def ledger_table(result: dict[str, Any]) -> str:
    """Microseconds per request."""
    rows = [("us per request", *result["landed"])]
    rows += [(kind, *(str(v) for v in result[kind].values())) for kind in ("landed", "aborted")]
    return f"{table(rows)}\n\ngate, us per request: {result['gate']}"
