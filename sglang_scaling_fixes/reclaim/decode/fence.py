"""P4: a decode rank makes its memory unreachable for what it sent some time ago.

Mooncake cannot close one session or revoke one key, and renewing a registration is
no fence: over TCP the receiver checks it when a write begins, not while it lands, and
over RDMA the sender's own retry fetches the new key. So a whole receiving engine is
destroyed, with its listeners, connections, queue pairs and registrations. Nobody who
is well shall notice: a second engine takes over first, for the same memory, and the old
one is closed when nothing that its owner still waits for can arrive there any more.

    before    prefill --- session A ---> engine A --> memory
    switch    new requests  -- session B --> engine B --> memory
              old ones      -- session A --> engine A -->   "      until they have landed
    retire    prefill --- session A -x                memory       nobody reads A's sockets
              prefill --- session B ---> engine B --> memory       A's ports stay taken

An engine never listens where one before it did, on this or another TP rank, so
that no late writer finds it behind an address it remembers. The old ports stay taken
for as long as this process lives, so that no other process on this host gets them;
whoever connects there is reset.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from sglang_scaling_fixes import machine
from sglang_scaling_fixes.errors import ScalingFixesError

_LISTEN = "0A"
"""TCP state in /proc/net/tcp."""

_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: close with a reset."""
_TRIES = 10
_RETRY_S = 0.5
"""Seconds: the kernel may keep a port while a peer has not closed its end."""
_DESTRUCTOR_SLEEPS_S = 1.0
"""Mooncake's listener looks whether it shall end after each visitor, and every second."""
KNOCK_S = 0.9 * _DESTRUCTOR_SLEEPS_S
"""Seconds between a visit and the destructor, which then waits for the rest of that second."""

_shut: set[int] = set()
"""The ports of engines that are no more, of all TP ranks."""


class FenceError(ScalingFixesError):
    """There is no fence: nothing is proven by it, and the engine in use stays in use."""


@dataclass
class Retiring:
    """An engine that nothing new is sent to. It still receives, until `retire` closes it."""

    session: str
    raw: Any
    """Mooncake's engine; the only reference to it. None once it is closed."""
    opened: set[str]
    """Every way into it, see `openings`."""
    knocked_at: float = 0.0
    """When its listener was last woken (seconds, monotonic), 0 if never."""

    def ready(self, now: float) -> bool:
        """Wake its listener; true as soon as its destructor will not sleep for long."""
        if not self.knocked_at:
            host, _, port = self.session.rpartition(":")
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=0.1).close()
            self.knocked_at = now
        return now - self.knocked_at >= KNOCK_S


def obstacle(server_args: Any) -> str | None:
    """Why this decode could not fence, None if it can: somebody else holds its engine too."""
    if getattr(server_args, "elastic_ep_backend", None) == "mooncake":
        return "--elastic-ep-backend mooncake shares the receiving engine"
    if getattr(server_args, "enable_hierarchical_cache", False) and (
        getattr(server_args, "hicache_storage_backend", None) == "mooncake"
    ):
        return "--hicache-storage-backend mooncake shares the receiving engine"
    return None


def switch(manager: Any) -> Retiring:
    """Another Mooncake engine takes over from the one of a stock decode `KVManager`.

    It receives into the same buffers; the old one still does. Raises `FenceError` if it
    cannot be; then the old one goes on as if nothing had been tried.
    """
    engine = manager.engine
    old = Retiring(str(engine.session_id), engine.engine, engine_has(engine))
    if f"port {_port(old.session)}" not in old.opened:
        raise FenceError(f"nobody saw what the engine of session {old.session} opened")
    with _any_error("no second engine could be made"):
        _replace(engine)
    try:
        with _any_error("the receive buffers could not be registered anew"):
            _register(manager, engine)
    except FenceError:
        take_back(manager, old)
        raise
    return old


@contextlib.contextmanager
def _any_error(what: str) -> Iterator[None]:
    """What fails in stock's or Mooncake's code is no reason for the scheduler to end."""
    try:
        yield
    except FenceError:
        raise
    except Exception as error:
        raise FenceError(f"{what} ({error})") from error


def take_back(manager: Any, old: Retiring) -> None:
    """Undo a `switch`: the new engine goes, nothing was sent under its session yet."""
    engine = manager.engine
    engine.engine, engine.session_id = old.raw, old.session
    record(engine, old.opened)


def retire(old: Retiring, of_all_ranks: Callable[[set[int]], set[int]]) -> None:
    """Close the engine. Raises `FenceError` if it cannot be shown to be gone.

    `of_all_ranks` returns the union of a set of ports over the TP ranks, once every rank has
    got here; it is called in any case. Blocks for up to a second, see `Retiring.ready`.
    """
    try:
        with _any_error(f"the engine of session {old.session} may not be closed whole"):
            _close(old)
    finally:
        _shut.update(of_all_ranks(_ports(old.opened)))


def _close(old: Retiring) -> None:
    if sys.getrefcount(old.raw) > 2:  # the field, and the argument of getrefcount
        raise FenceError(f"the engine of session {old.session} is held by another part here")
    old.raw = None  # its destructor closes and joins all
    if left := old.opened & openings():
        raise FenceError(
            f"the engine of session {old.session} was not closed whole: {sorted(left)}"
        )
    if still_open := _ports(old.opened) & _local_ports():
        raise FenceError(f"connections of session {old.session} are still open at {still_open}")
    threading.Thread(target=_keep, args=(_ports(old.opened),), daemon=True).start()


def record(engine: Any, opened: set[str]) -> None:
    """Remember what stock's constructor of `engine` opened (`openings` after, less before)."""
    engine.sglang_scaling_fixes_opened = opened


def engine_has(engine: Any) -> set[str]:
    """What was recorded of an engine; a fence is over only once all of it is closed."""
    opened: set[str] = getattr(engine, "sglang_scaling_fixes_opened", set())
    return opened


def opened_rdma(engine: Any) -> bool:
    """Whether an RDMA device is among what was recorded of an engine. That this process has one
    open proves nothing: NCCL opens them too."""
    return any(machine.UVERBS in opening for opening in engine_has(engine))


def openings() -> set[str]:
    """Every way into this process that an engine makes: listening sockets, RDMA devices."""
    doors = {f"port {port}" for port in _listening()}
    return doors | {f"{number}: {target}" for number, target in _rdma_handles()}


def _rdma_handles() -> list[tuple[str, str]]:
    """The RDMA devices this process has open. Closing one ends all its queue pairs."""
    return [file for file in machine.here.open_files() if file[1].startswith(machine.UVERBS)]


def _replace(engine: Any) -> None:
    """A new engine in stock's wrapper, at ports that none had before."""
    for _ in range(_TRIES):
        doors = _listening()
        fresh = type(engine)(
            hostname=engine.hostname, gpu_id=engine.gpu_id, ib_device=engine.ib_device
        )
        if not (_listening() - doors) & _shut:
            engine.engine, engine.session_id = fresh.engine, fresh.session_id
            record(engine, engine_has(fresh))
            return
        fresh.engine = None
    raise FenceError(f"no engine with new ports in {_TRIES} tries")


def _register(manager: Any, engine: Any) -> None:
    """Stock's own registration of all receive buffers, with its results looked at."""
    results: list[int] = []
    stock = engine.batch_register

    def counted(ptrs: list[int], lengths: list[int]) -> int:
        results.append(int(stock(ptrs, lengths) or 0))
        return results[-1]

    engine.batch_register = counted
    try:
        manager.register_buffer_to_engine()
    finally:
        del engine.batch_register
    if not results or any(results):
        raise FenceError(f"the receive buffers could not be registered anew ({results})")


def _keep(ports: set[int]) -> None:
    """Hold `ports` for ever, as soon as the kernel lets go of them; reset every visitor."""
    wanted = set(ports)
    with selectors.DefaultSelector() as doors:
        while True:
            for port in sorted(wanted):
                with contextlib.suppress(OSError):
                    dual = socket.has_dualstack_ipv6()
                    family = socket.AF_INET6 if dual else socket.AF_INET
                    door = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
                    doors.register(door, selectors.EVENT_READ)
                    wanted.discard(port)
            for key, _ in doors.select(_RETRY_S if wanted else None):
                door = cast(socket.socket, key.fileobj)
                with contextlib.suppress(OSError):
                    visitor, _ = door.accept()
                    visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                    visitor.close()


def _port(session: str) -> int:
    return int(session.rpartition(":")[2])


def _ports(opened: set[str]) -> set[int]:
    return {int(way.removeprefix("port ")) for way in opened if way.startswith("port ")}


def _listening() -> set[int]:
    return {port for port, state in _sockets() if state == _LISTEN}


def _local_ports() -> set[int]:
    return {port for port, _ in _sockets()}


def _sockets() -> set[tuple[int, str]]:
    """Local port and state of every TCP socket this process has open."""
    targets = (target for _, target in machine.here.open_files())
    inodes = {target[len("socket:[") : -1] for target in targets if target.startswith("socket:[")}
    return {
        (int(fields[1].rpartition(":")[2], 16), fields[3])
        for fields in machine.here.tcp_sockets()
        if fields[9] in inodes
    }
