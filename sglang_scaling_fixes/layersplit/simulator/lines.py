"""Lines of a trace, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.errors import ConfigError

MOST_TOKENS = 10_000_000
"""Of one prompt. More is a wrong unit, and would take the memory of this machine."""
LATEST = 1e18
"""Of a time in any unit: microseconds since the epoch are 10^15."""
REMEDY = "correct it or leave it out"


@dataclass(frozen=True)
class Line:
    """One JSON object of the file. Each method raises ConfigError that names file, line, field and
    value."""

    file: str
    number: int
    fields: dict[str, Any]

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"TRACE {self.file}, line {self.number}: {what}; {REMEDY}")

    def count(self, name: str, least: int) -> int:
        """A whole number of tokens, from `least` to `MOST_TOKENS`."""
        value = self._get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not (least <= value <= MOST_TOKENS)
        ):
            raise self.wrong(f"{name} {_short(value)} is no whole number from {least}")
        return value

    def time(self, name: str) -> float:
        """A number from 0 to `LATEST`, in the format's own unit."""
        value = self._get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (0 <= value <= LATEST)
        ):
            raise self.wrong(f"{name} {_short(value)} is no time from 0")
        return float(value)

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str):
            raise self.wrong(f"{name} {_short(value)} is no text")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Ids of blocks, at least one."""
        value = self._get(name)
        if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
            raise self.wrong(f"{name} {_short(value)} is no list of block ids")
        return tuple(value)

    def _get(self, name: str) -> Any:
        if name not in self.fields:
            raise self.wrong(f"no {name}")
        return self.fields[name]


def read(path: Path) -> Iterator[Line]:
    """The file's lines without the empty ones, numbered from 1. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield Line(str(path), number, _object(path, number, text))
    except OSError as error:
        raise ConfigError(f"TRACE {path}: {error.strerror}; name a file of requests") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"TRACE {path}: not UTF-8; name a file of JSON lines") from error


def _object(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"TRACE {path}, line {number}: no JSON object: {_short(text.strip())}; {REMEDY}"
        )
    return found


def _short(value: object) -> str:
    """On one line, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
