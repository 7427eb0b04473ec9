"""The settings of `retry-proxy`, checked before it listens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sglang_scaling_fixes import vouch
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.retry import servers as lists
from sglang_scaling_fixes.retry.servers import Server

RETRY_STATUS = frozenset({500, 502, 503, 504})
"""500 is among them, because stock answers it when the KV of a request was lost on its way."""
FILE_FLAG, SECRET_FLAG, STATUS_FLAG = "--workers-file", "--secret-file", "--retry-status"


@dataclass(frozen=True)
class ProxySettings:
    """One field per flag; `command.py` says what each is for. Times are in seconds.

    `max_inflight` 0: as many as the limit of open files allows. `admin_port` None: no port of
    its own for health and metrics.
    """

    servers: tuple[Server, ...]
    workers_file: str = ""
    secret: bytes = b""
    retry_status: frozenset[int] = RETRY_STATUS
    host: str = "127.0.0.1"
    port: int = 30100
    admin_port: int | None = None
    attempts: int = 3
    hold_tokens: int = 0
    migrations: int = 0
    trail_tokens: int = 0
    hold_bytes: int = 8 << 20
    max_inflight: int = 0
    max_body_bytes: int = 64 << 20
    max_held_bytes: int = 1 << 30
    avoid_seconds: float = 30.0
    refuse_seconds: float = 60.0
    probe_interval: float = 5.0
    probe_timeout: float = 25.0
    connect_timeout: float = 5.0
    idle_timeout: float = 600.0
    first_token_timeout: float = 600.0
    token_timeout: float = 120.0
    drain_delay: float = 0.0
    grace: float = 30.0


NUMBERS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "admin_port": (0, 65535),
    "attempts": (1, 100),
    "hold_tokens": (0, 1_000_000),
    "migrations": (0, 100),
    "trail_tokens": (0, 1_000_000),
    "hold_bytes": (1024, 1 << 40),
    "max_inflight": (0, 1_000_000),
    "max_body_bytes": (1, 1 << 40),
    "max_held_bytes": (1024, 1 << 50),
    "avoid_seconds": (0, 86_400),
    "refuse_seconds": (0, 86_400),
    "probe_interval": (0.1, 86_400),
    "probe_timeout": (0.1, 86_400),
    "connect_timeout": (0.01, 600),
    "idle_timeout": (0.01, 86_400),
    "first_token_timeout": (0.01, 86_400),
    "token_timeout": (0.01, 86_400),
    "drain_delay": (0, 86_400),
    "grace": (1, 86_400),
}
"""The least and the greatest value of each number."""


def checked_settings(
    given: Mapping[str, Iterable[str]],
    *,
    workers_file: str = "",
    secret_file: str = "",
    retry_status: str | None = None,
    host: str = ProxySettings.host,
    **numbers: str | int | float | None,
) -> ProxySettings:
    """`given`: the servers by word of `servers.WORDS`. `numbers`: fields, as numbers or text.

    Raises ConfigError, which names the flag, its value and the remedy.
    """
    found = all_servers(given, workers_file)
    checked = {n: _number(n, value) for n, value in numbers.items() if value is not None}
    if checked.get("trail_tokens") and not checked.get("migrations"):
        raise ConfigError(
            f"--trail-tokens {checked['trail_tokens']}: no stream is continued without "
            "--migrations; add --migrations 1"
        )
    return ProxySettings(
        tuple(found),
        workers_file=workers_file,
        secret=vouch.read_secret(SECRET_FLAG, secret_file) if secret_file else b"",
        retry_status=RETRY_STATUS if retry_status is None else _statuses(retry_status),
        host=host.removeprefix("[").removesuffix("]"),
        **checked,  # type: ignore[arg-type]
    )


def all_servers(given: Mapping[str, Iterable[str]], workers_file: str) -> list[Server]:
    """Those of the flags and those of the file. Raises ConfigError."""
    found = lists.from_flags(given)
    if workers_file:
        found += lists.read_file(FILE_FLAG, workers_file)
    lists.check(found)
    return found


def _statuses(text: str) -> frozenset[int]:
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 400 <= int(part) <= 599 for part in found):
        raise ConfigError(
            f"{STATUS_FLAG} {text!r} is not a list of statuses from 400 to 599; write "
            f"{','.join(map(str, sorted(RETRY_STATUS)))}"
        )
    return frozenset(map(int, found))


def _number(name: str, value: str | int | float) -> int | float:
    kind: type = int if name == "admin_port" else type(getattr(ProxySettings, name))
    low, high = NUMBERS[name]
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        what = "a whole number" if kind is int else "a number of seconds"
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} {value!r} is not {what} from {low:g} to {high:g}")
    return number  # type: ignore[no-any-return]
