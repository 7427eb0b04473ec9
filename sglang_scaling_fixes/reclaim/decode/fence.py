"""P4: a decode rank makes its memory unreachable for everything sent to it so far.

Mooncake cannot close one session or revoke one key, and renewing a registration is
no fence: over TCP the receiver checks it when a write begins, not while it lands, and
over RDMA the sender's own retry fetches the new key. So the whole receiving engine is
destroyed, with its listeners, connections, queue pairs and registrations, and another
one takes its place under a new session:

    before   prefill --- session A ---> engine A --> memory
    between  prefill --- session A -x                memory    nobody reads A's sockets
    after    prefill --- session B ---> engine B --> memory    A's ports stay taken

Engine B never listens where an engine before it did, on this or another TP rank, so
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
from collections.abc import Callable
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

_shut: set[int] = set()
"""The ports of engines that are no more, of all TP ranks."""


class FenceError(ScalingFixesError):
    """There is no fence, or no engine behind it: this process must not go on."""


def obstacle(server_args: Any) -> str | None:
    """Why this decode could not fence, None if it can: somebody else holds its engine too."""
    if getattr(server_args, "elastic_ep_backend", None) == "mooncake":
        return "--elastic-ep-backend mooncake shares the receiving engine"
    if getattr(server_args, "enable_hierarchical_cache", False) and (
        getattr(server_args, "hicache_storage_backend", None) == "mooncake"
    ):
        return "--hicache-storage-backend mooncake shares the receiving engine"
    return None


def renew(manager: Any, of_all_ranks: Callable[[set[int]], set[int]]) -> tuple[str, str]:
    """Replace the Mooncake engine of a stock decode `KVManager`; its old and new session.

    `of_all_ranks` returns the union of a set of ports over the TP ranks, once every
    rank has closed its engine. Blocks for about a second (Mooncake's listener thread
    wakes up once a second). Raises `FenceError` if the old engine cannot be shown to
    be gone.
    """
    engine = manager.engine
    old = str(engine.session_id)
    own = engine_has(engine)
    doors = _listening()
    devices = len(_rdma_handles()) if opened_rdma(engine) else 0
    _destroy(engine)
    shut = doors - _listening()
    if _port(old) not in shut or (devices and len(_rdma_handles()) >= devices):
        raise FenceError(
            f"the receiving engine of session {old} is still in use by another part of this "
            "process and could not be closed"
        )
    if left := own & openings():
        raise FenceError(f"the engine of session {old} was not closed whole: {sorted(left)}")
    if still_open := shut & _local_ports():
        raise FenceError(f"connections of session {old} are still open at ports {still_open}")
    threading.Thread(target=_keep, args=(shut,), daemon=True).start()
    _shut.update(of_all_ranks(shut))
    _replace(engine)
    _register(manager, engine)
    return old, str(engine.session_id)


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
        _destroy(fresh)
    raise FenceError(f"no engine with new ports in {_TRIES} tries")


def _destroy(engine: Any) -> None:
    """Drop the only reference to Mooncake's engine: its destructor closes and joins all."""
    raw, engine.engine = engine.engine, None
    if sys.getrefcount(raw) > 2:  # `raw` and the argument of getrefcount
        engine.engine = raw
        raise FenceError("the receiving engine is held by another part of this process")
    del raw


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
