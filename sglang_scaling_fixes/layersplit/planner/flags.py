"""Words of the command line to numbers. Each raises ConfigError: flag, value, what to write."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

from sglang_scaling_fixes.errors import ConfigError

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
"""Bytes."""
THOUSAND = 1000
"""What K stands for behind a number of tokens."""

_SIZE = re.compile(rf"([0-9]{{1,12}}(?:\.[0-9]{{1,12}})?)({'|'.join(UNITS)})")
_TOKENS = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(K?)")


def size(flag: str, text: str) -> int:
    """Bytes, rounded down: `26.22GiB`, `28GB`."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{flag} {text!r} is not a size; write a number and one of {', '.join(UNITS)}, "
            "as in 26.22GiB"
        )
    return int(Decimal(found[1]) * UNITS[found[2]])


def tokens(flag: str, text: str) -> int:
    """A number of tokens, at least 1: `40000`, `40K`."""
    found = _TOKENS.fullmatch(text)
    number = Decimal(found[1]) * (THOUSAND if found[2] else 1) if found else Decimal(0)
    if number < 1 or number != int(number):
        raise ConfigError(
            f"{flag} {text!r} is not a number of tokens; write 40000, or 40K for {40 * THOUSAND}"
        )
    return int(number)


def token_list(flag: str, text: str) -> list[int]:
    """Numbers of tokens with commas between them, as they are given: `40K,80K`."""
    return [tokens(flag, part.strip()) for part in text.split(",")]


def whole(flag: str, text: str, low: int, high: int, what: str) -> int:
    """A whole number from `low` to `high`; `what` says of what."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ConfigError(
            f"{flag} {text!r} is not a number of {what}; write one of {low} to {high}"
        )
    return int(text)


def share(flag: str, text: str) -> float:
    """A number from 0 to 1."""
    return _number(flag, text, "a share", 0.0, 1.0)


def speed(flag: str, text: str) -> float:
    """A number from 0.001 to 1,000,000."""
    return _number(flag, text, "a speed", 0.001, 1e6)


def time(flag: str, text: str) -> float:
    """A number from 0 to 1,000,000, in the flag's unit."""
    return _number(flag, text, "a time", 0.0, 1e6)


def one_of(flag: str, text: str, known: Iterable[str]) -> str:
    """`text`, if it is one of them."""
    names = list(known)
    if text not in names:
        raise ConfigError(f"{flag} {text!r} is not known; write {' or '.join(names)}")
    return text


def _number(flag: str, text: str, what: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise ConfigError(f"{flag} {text!r} is not {what}; write a number from {low:g} to {high:g}")
    return number
