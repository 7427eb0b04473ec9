"""The pictures of the ledgers' tables, drawn from the tables they run on."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from sglang_scaling_fixes.reclaim.rules.attempt import ATTEMPT_TRANSITIONS
from sglang_scaling_fixes.reclaim.rules.exposure import CREDENCE, TRANSITIONS, Speaker

State = TypeVar("State", bound=enum.StrEnum)

DOC = Path(__file__).parents[2] / "docs" / "safe-reclaim.md"


def diagram(transitions: Mapping[tuple[State, str], State]) -> str:
    """Mermaid, in the order of the table. Where nothing leads on is an end."""
    first = next(iter(transitions))[0]
    last = [s for s in type(first) if all(s is not source for source, _ in transitions)]
    lines = [f"[*] --> {first}"]
    lines += [f"{source} --> {to}: {event}" for (source, event), to in transitions.items()]
    lines += [f"{state} --> [*]" for state in last]
    body = "".join(f"    {line}\n" for line in lines)
    return f"```mermaid\nstateDiagram-v2\n{body}```\n"


def credence() -> str:
    """A Markdown table: what an answer is worth, by who gives it."""
    lines = [f"| AbortAck | {' | '.join(Speaker)} |", "|---" * (len(Speaker) + 1) + "|"]
    for verdict in dict.fromkeys(verdict for verdict, _ in CREDENCE):
        worth = ("proves P2" if CREDENCE[verdict, who] else "proves nothing" for who in Speaker)
        lines.append(f"| `{verdict}` | {' | '.join(worth)} |")
    return "\n".join(lines) + "\n"


PICTURES = {
    "exposure": diagram(TRANSITIONS),
    "attempt": diagram(ATTEMPT_TRANSITIONS),
    "credence": credence(),
}
"""Name -> what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""


def in_doc(name: str, text: str) -> str:
    """What stands between the markers."""
    return text.partition(f"<!-- {name}: begin -->\n")[2].partition(f"<!-- {name}: end -->\n")[0]


def renewed(text: str, name: str, picture: str) -> str:
    between = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->\n)"
    return re.sub(between, lambda m: m[1] + picture + m[2], text, flags=re.S)


def main() -> None:
    text = DOC.read_text()
    for name, picture in PICTURES.items():
        text = renewed(text, name, picture)
    DOC.write_text(text)


if __name__ == "__main__":
    main()
