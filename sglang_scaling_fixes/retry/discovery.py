"""The list of workers while the proxy runs: read again on SIGHUP, and names looked up again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.retry.servers import Server
from sglang_scaling_fixes.retry.telemetry import log
from sglang_scaling_fixes.retry.workers import Workers

LOOK_UP_S = 5.0
"""Between two look-ups of names."""


class Discovery:
    """Keeps `workers` what the list says. `read` gives the list; it may raise ConfigError."""

    def __init__(
        self, workers: Workers, servers: Iterable[Server], read: Callable[[], list[Server]]
    ) -> None:
        self._workers = workers
        self._servers = list(servers)
        self._read = read
        self._addresses: dict[str, list[str]] = {}

    async def run(self) -> None:
        """Until cancelled: look the names up."""
        while True:
            await self.look_up()
            await asyncio.sleep(LOOK_UP_S)

    async def reload(self) -> None:
        """Read the list again. A list that is wrong changes nothing."""
        try:
            servers = self._read()
        except ConfigError as error:
            log(event="not_reloaded", message=str(error))
            return
        new = {s.hostname for s in servers if s.dns} - self._addresses.keys()
        unknown = [name for name in sorted(new) if not await _addresses(name)]
        if unknown:
            log(event="not_reloaded", message=f"no address of {', '.join(unknown)}")
            return
        self._servers = servers
        await self.look_up()
        log(event="reloaded", workers=len(self._workers.all))

    async def look_up(self) -> None:
        names = sorted({s.hostname for s in self._servers if s.dns})
        found = await asyncio.gather(*map(_addresses, names))
        for name, addresses in zip(names, found, strict=True):
            if addresses:
                self._addresses[name] = addresses
            else:
                log(event="no_address", name=name)  # the last ones found stay
        self._apply()

    def _apply(self) -> None:
        wanted: list[Server] = []
        for server in self._servers:
            if server.dns:
                wanted += [server.at(a) for a in self._addresses.get(server.hostname, ())]
            else:
                wanted.append(server)
        came, went = self._workers.replace(wanted)
        for server in came:
            log(event="worker_added", worker=server.url)
        for server in went:
            log(event="worker_removed", worker=server.url)


async def _addresses(name: str) -> list[str]:
    """All addresses of a name, none if it has none or nobody knows."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({str(address[0]) for *_, address in found})
