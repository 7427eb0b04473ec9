"""Results of a race and of a soak as text."""

from __future__ import annotations

from typing import Any

_COLUMNS = ("requests", "aborted", "victims", "refused", "corrupted_pages", "wrong_outputs")

SOAK_ROWS = (
    "requests", "right", "aborted", "hung_up", "refused", "unanswered", "corrupted_outputs",
    "corrupted_kv", "leaked_tokens", "leaked_metadata", "held_tokens", "aborts", "kills", "stalls",
    "fences",
)  # fmt: skip


def race_table(result: dict[str, Any]) -> str:
    """The result as a small table: stock and fixed, one row each."""
    rows = [["", *(name.replace("_", " ") for name in _COLUMNS)]]
    rows += [[half, *(str(result[half][c]) for c in _COLUMNS)] for half in ("stock", "fixed")]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    title = f"SGLang {result['release']}, scenario {result['scenario']}{_over(result)}"
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    if result["stock_safe"]:
        lines.append("Stock is safe here: nothing of its victims was corrupted in these rounds.")
    return "\n".join(["", title, *lines, ""])


def soak_table(result: dict[str, Any]) -> str:
    """The counts, one a line; then proofs and what refused requests were told."""
    width = max(len(name) for name in SOAK_ROWS)
    title = f"SGLang {result['release']}, soak of {result['minutes']:g} min, {result['half']}"
    lines = ["", title + _over(result)]
    lines += [f"{name.replace('_', ' '):<{width}}  {result[name]:>6}" for name in SOAK_ROWS]
    proofs = ", ".join(f"{name} {count}" for name, count in result["frees_by_proof"].items())
    lines.append(f"{'frees by proof':<{width}}  {proofs or 'none'}")
    lines += [f"{count:>6} x {words}" for words, count in result["refusals"].items()]
    if result["decode_crashed"]:
        lines.append(f"The decode server ended by itself: logs in {result['run_dir']}")
    return "\n".join([*lines, ""])


def _over(result: dict[str, Any]) -> str:
    return ", over RDMA verbs in software" if result["transport"] == "rdma" else ""
