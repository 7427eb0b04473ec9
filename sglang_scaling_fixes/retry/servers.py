"""The servers that requests go to, as flags or a file name them. No I/O except `read_file`.

    worker URL                                    a server or router that answers alone
    pd prefill=URL,decode=URL[,bootstrap-port=N]  two halves that serve requests together
    prefill URL[,bootstrap-port=N]                a half that serves with any decode of the list
    decode URL                                    a half that serves with any prefill of the list

A flag is such a line with `--` before it. `dns+http://NAME:PORT` stands for a server at every
address that the name has; it is looked up again and again.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from sglang_scaling_fixes.errors import ConfigError

BOOTSTRAP_PORT = 8998
"""The port where a stock prefill server listens for decode servers by default."""
WORDS = ("worker", "pd", "prefill", "decode")
DNS = "dns+"
_PAIR_KEYS = ("prefill", "decode", "bootstrap-port")


class Role(enum.StrEnum):
    WORKER = "worker"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Server:
    """One server. Halves serve together if they have the same `group`.

    `group`: the line of a `pd`; "" for the halves of a pool. `dns`: the host is a name that
    stands for all of its addresses. `bootstrap_port`: of a prefill.
    """

    url: str
    role: Role = Role.WORKER
    group: str = ""
    bootstrap_port: int = BOOTSTRAP_PORT
    dns: bool = False

    @property
    def host(self) -> str:
        """As it stands in a URL: an IPv6 address has brackets."""
        return _bracketed(urlsplit(self.url).hostname or "")

    @property
    def hostname(self) -> str:
        return urlsplit(self.url).hostname or ""

    def at(self, address: str) -> Server:
        """The server at one address of a name."""
        parts = urlsplit(self.url)
        url = f"{parts.scheme}://{_bracketed(address)}:{parts.port}"
        return replace(self, url=url, dns=False)


def from_flags(given: Mapping[str, Iterable[str]]) -> list[Server]:
    """`given`: values by word of `WORDS`. Raises ConfigError."""
    return [
        server for word in WORDS for text in given.get(word, ()) for server in _parse(word, text)
    ]


def read_file(flag: str, path: str) -> list[Server]:
    """The servers that a file lists, one line each; `#` begins a comment. Raises ConfigError."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag} {path}: cannot be read ({words}); give a text file") from None
    found: list[Server] = []
    for number, line in enumerate(lines, 1):
        word, _, text = line.partition("#")[0].strip().partition(" ")
        if not word:
            continue
        if word not in WORDS:
            raise ConfigError(
                f"{flag} {path}, line {number}: {word!r} is not known; begin with one of "
                + ", ".join(WORDS)
            )
        found += _parse(word, text.strip())
    return found


def check(servers: Sequence[Server]) -> None:
    """Raises ConfigError if they cannot serve together."""
    if not servers:
        raise ConfigError(
            "no worker is given: add --worker URL, --pd prefill=URL,decode=URL, or --prefill URL "
            "and --decode URL"
        )
    seen: set[str] = set()
    for server in servers:
        if server.url in seen:
            raise ConfigError(
                f"{server.url} is given twice; give each worker once, so that a retry reaches "
                "another one"
            )
        seen.add(server.url)
    pool = {server.role for server in servers if not server.group}
    for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        if role in pool and other not in pool:
            raise ConfigError(
                f"a {role} is given and no {other} to serve with it; add --{other} URL"
            )


def _parse(word: str, text: str) -> list[Server]:
    flag = f"--{word}"
    if word == "pd":
        return _pair(text)
    url, _, rest = text.partition(",")
    port = BOOTSTRAP_PORT
    if rest:
        key, _, value = rest.partition("=")
        if word != "prefill" or key != "bootstrap-port":
            raise ConfigError(f"{flag} {text!r}: {rest!r} is not known; write {word} URL alone")
        port = _port(flag, text, value)
    dns = url.startswith(DNS)
    origin = _origin(flag, url.removeprefix(DNS), text)
    return [Server(origin, Role(word), "", port, dns)]


def _pair(text: str) -> list[Server]:
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
        if found[key].startswith(DNS):
            raise ConfigError(
                f"--pd {text!r}: a name of many servers is no half of one pair; give it with "
                f"--{key}"
            )
    port = _port("--pd", text, found.get("bootstrap-port", str(BOOTSTRAP_PORT)))
    prefill = _origin("--pd", found["prefill"], text)
    decode = _origin("--pd", found["decode"], text)
    group = f"{prefill}+{decode}"
    return [Server(prefill, Role.PREFILL, group, port), Server(decode, Role.DECODE, group)]


def _port(flag: str, given: str, port: str) -> int:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{flag} {given!r}: bootstrap-port {port!r} is not a port; use 1 to 65535"
        )
    return int(port)


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


def _bracketed(host: str) -> str:
    try:
        return f"[{ipaddress.IPv6Address(host)}]"
    except ValueError:
        return host
