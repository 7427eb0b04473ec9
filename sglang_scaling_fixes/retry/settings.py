"""The settings of `retry-proxy`, checked before it listens."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from sglang_scaling_fixes.errors import ConfigError

BOOTSTRAP_PORT = 8998
"""The port where a stock prefill server listens for decode servers by default."""

_PAIR_KEYS = ("prefill", "decode", "bootstrap-port")


@dataclass(frozen=True)
class Pair:
    """The prefill server of a pair. Decode reaches its bootstrap server at `host` and `port`."""

    prefill: str
    host: str
    port: int


@dataclass(frozen=True)
class Target:
    """Where one attempt goes. `url` answers the client; `pair` is the prefill server, if any."""

    url: str
    pair: Pair | None = None

    @property
    def name(self) -> str:
        """The name in logs and metrics."""
        return f"{self.pair.prefill}+{self.url}" if self.pair else self.url

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.pair.prefill, self.url) if self.pair else (self.url,)


@dataclass(frozen=True)
class ProxySettings:
    """One field per flag; `command.py` says what each is for. Times are in seconds."""

    targets: tuple[Target, ...]
    host: str = "127.0.0.1"
    port: int = 30100
    attempts: int = 3
    hold_tokens: int = 0
    hold_bytes: int = 8 << 20
    max_inflight: int = 1024
    max_body_bytes: int = 64 << 20
    max_held_bytes: int = 1 << 30
    avoid_seconds: float = 30.0
    connect_timeout: float = 5.0
    idle_timeout: float = 600.0
    grace: float = 30.0


_BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "attempts": (1, 100),
    "hold_tokens": (0, 1_000_000),
    "hold_bytes": (1024, 1 << 40),
    "max_inflight": (1, 1_000_000),
    "max_body_bytes": (1, 1 << 40),
    "max_held_bytes": (1024, 1 << 50),
    "avoid_seconds": (0, 86_400),
    "connect_timeout": (0.01, 600),
    "idle_timeout": (0.01, 86_400),
    "grace": (1, 86_400),
}


def checked_settings(
    workers: Iterable[str], pairs: Iterable[str], **numbers: str | int | float
) -> ProxySettings:
    """`workers` and `pairs` as the flags give them. `numbers`: other fields of `ProxySettings`,
    as numbers or as a flag's text.

    Raises ConfigError, which names the flag, its value and the remedy.
    """
    targets = (
        *(Target(_origin("--worker", url, url)) for url in workers),
        *(_pair(text) for text in pairs),
    )
    if not targets:
        raise ConfigError("no worker is given: add --worker URL or --pd prefill=URL,decode=URL")
    seen: set[str] = set()
    for url in (url for target in targets for url in target.urls):
        if url in seen:
            raise ConfigError(
                f"{url} is given twice; give each worker once, so that a retry reaches another one"
            )
        seen.add(url)
    checked = {name: _number(name, value) for name, value in numbers.items() if name != "host"}
    host = {"host": str(numbers["host"])} if "host" in numbers else {}
    return ProxySettings(targets, **host, **checked)  # type: ignore[arg-type]


def _number(name: str, value: str | int | float) -> int | float:
    kind = type(getattr(ProxySettings, name))
    low, high = _BOUNDS[name]
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        what = "a whole number" if kind is int else "a number of seconds"
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} {value!r} is not {what} from {low:g} to {high:g}")
    return number  # type: ignore[no-any-return]


def _pair(text: str) -> Target:
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key not in _PAIR_KEYS or not equals:
            raise ConfigError(
                f"--pd {text!r}: {part!r} is not known; write prefill=URL,decode=URL, and "
                f"bootstrap-port=N if prefill's is not {BOOTSTRAP_PORT}"
            )
        if key in found:
            raise ConfigError(f"--pd {text!r}: {key} is given twice; give it once")
        found[key] = value
    for key in ("prefill", "decode"):
        if key not in found:
            raise ConfigError(f"--pd {text!r} has no {key}; add {key}=URL")
    port = found.get("bootstrap-port", str(BOOTSTRAP_PORT))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--pd {text!r}: bootstrap-port {port!r} is not a port; use 1 to 65535")
    prefill = _origin("--pd", found["prefill"], text)
    decode = _origin("--pd", found["decode"], text)
    return Target(decode, Pair(prefill, _dialled(prefill), int(port)))


def _origin(flag: str, url: str, given: str) -> str:
    """`scheme://host:port` in one spelling, so that duplicates are found. Raises ConfigError."""
    remedy = "write http://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{flag} {given!r}: {url!r} is not a URL ({error}); {remedy}") from None
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in url):
        raise ConfigError(f"{flag} {given!r}: {url!r} is not an http or https URL; {remedy}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{flag} {given!r}: {url!r} contains a user name; {remedy}")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(
            f"{flag} {given!r}: {url!r} has a path or query, but the client's is used; {remedy}"
        )
    port = port if port is not None else {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{_bracketed(host)}:{port}"


def _dialled(origin: str) -> str:
    return _bracketed(urlsplit(origin).hostname or "")


def _bracketed(host: str) -> str:
    try:
        return f"[{ipaddress.IPv6Address(host)}]"
    except ValueError:
        return host
