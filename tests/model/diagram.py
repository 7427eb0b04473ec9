"""The state diagram of an exposure, drawn from the table the ledger runs on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sglang_scaling_fixes.reclaim.ledger import TRANSITIONS, State

DOC = Path(__file__).parents[2] / "docs" / "safe-reclaim.md"
BEGIN, END = "<!-- diagram: begin -->\n", "<!-- diagram: end -->\n"


def diagram(transitions: Mapping[tuple[State, str], State] = TRANSITIONS) -> str:
    """Mermaid, in the order of the table."""
    first = next(iter(transitions))[0]
    last = [state for state in State if all(state is not source for source, _ in transitions)]
    lines = [f"[*] --> {first}"]
    lines += [f"{source} --> {to}: {event}" for (source, event), to in transitions.items()]
    lines += [f"{state} --> [*]" for state in last]
    body = "".join(f"    {line}\n" for line in lines)
    return f"```mermaid\nstateDiagram-v2\n{body}```\n"


def in_doc(text: str) -> str:
    """What stands between the markers."""
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    text = DOC.read_text()
    DOC.write_text(text.replace(in_doc(text), diagram()))


if __name__ == "__main__":
    main()
