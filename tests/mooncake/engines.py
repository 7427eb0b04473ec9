"""Two processes with a real Mooncake engine each, on the loopback: over TCP, or with
MOONCAKE_PROTOCOL=rdma over RDMA verbs in software.

python -m tests.mooncake.engines receive MODE   |   send ONCE SESSION ADDRESS   |   leave DOOR

Both print JSON lines and read lines from stdin. The receiver says where it is. At the first byte
of a long write it says so, and on the next line does what MODE says:

    fence          fence.switch and fence.retire, as decode does, without waiting
    unregister     the end of the registration
    renew          its end, and a new one of the same memory
    switch         fence.switch alone

Then it says how many bytes were there, clears its memory, and on the next line says how many came
afterwards. Under "switch" it clears nothing, and after the last line retires the first engine.
Under "count" it waits for no write: it answers each line with the bytes that came, and clears them.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from typing import Any

from mooncake.engine import TransferEngine

from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.prefill.interposers import IN_HAND, EngineInterposer

SIZE = 384 << 20
SMALL = 1 << 20
HOST = "127.0.0.1"


class StockEngine:
    """The part of SGLang's `MooncakeTransferEngine` that the fence and the interposer use."""

    def __init__(self, hostname: str, gpu_id: int, ib_device: str) -> None:
        self.hostname, self.gpu_id, self.ib_device = hostname, gpu_id, ib_device
        before = fence.openings()
        self.engine = TransferEngine()
        protocol = os.environ.get("MOONCAKE_PROTOCOL", "tcp")
        assert self.engine.initialize(hostname, "P2PHANDSHAKE", protocol, ib_device) == 0
        self.session_id = f"{hostname}:{self.engine.get_rpc_port()}"
        fence.record(self, fence.openings() - before)

    def batch_register(self, ptrs: list[int], lengths: list[int]) -> int:
        return int(self.engine.batch_register_memory(ptrs, lengths))

    def batch_transfer_sync(
        self, session: str, buffers: list[int], peers: list[int], lengths: list[int]
    ) -> int:
        return int(self.engine.batch_transfer_sync_write(session, buffers, peers, lengths))


class Memory:
    """A buffer outside Python's reach."""

    def __init__(self, fill: int) -> None:
        self._buffer = (ctypes.c_char * SIZE)()
        self.address = ctypes.addressof(self._buffer)
        self.fill(fill)

    def fill(self, byte: int) -> None:
        ctypes.memset(self.address, byte, SIZE)

    def count(self, byte: int, size: int = SIZE) -> int:
        return ctypes.string_at(self.address, size).count(bytes([byte]))

    def first(self) -> bytes:
        return ctypes.string_at(self.address, 1)


class Manager:
    """The part of stock's decode KV manager that the fence uses."""

    def __init__(self, memory: Memory) -> None:
        self.engine = StockEngine(HOST, 0, "")
        self.memory = memory
        self.register_buffer_to_engine()

    def register_buffer_to_engine(self) -> None:
        self.engine.batch_register([self.memory.address], [SIZE])


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def receive(mode: str) -> None:
    memory = Memory(0)
    manager = Manager(memory)
    say(session=manager.engine.session_id, address=memory.address)
    if mode == "count":
        for _ in sys.stdin:
            say(count=memory.count(255))
            memory.fill(0)
        return
    while memory.first() == b"\0":
        time.sleep(0.0002)
    say(begun=True)
    sys.stdin.readline()
    if mode == "switch":
        old = fence.switch(manager)
        say(session=manager.engine.session_id, address=memory.address)
        sys.stdin.readline()
        say(long=memory.count(255))
        while not old.ready(time.monotonic()):
            time.sleep(0.01)
        fence.retire(old, lambda ports: ports)
        say(retired=True)
        return
    if mode == "fence":
        fence.retire(fence.switch(manager), lambda ports: ports)
    else:
        manager.engine.engine.unregister_memory(memory.address)
        if mode == "renew":
            manager.register_buffer_to_engine()
    landed = memory.count(255)
    memory.fill(0)
    say(landed=landed, session=manager.engine.session_id, address=memory.address)
    sys.stdin.readline()
    say(late=memory.count(255))
    sys.stdin.readline()
    say(small=memory.count(255, SMALL))


class Counted:
    """A chunk ledger that counts what it is told."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def wrote(self, attempt: Any, session: str) -> None:
        pass

    def failed(self, attempt: Any, reason: str) -> None:
        del attempt
        self.failures.append(reason)


def send(once: bool) -> None:
    ledger = Counted()
    engine: Any = EngineInterposer(StockEngine(HOST, 0, ""), ledger, once=once)  # type: ignore[arg-type]
    memory = Memory(255)
    engine.batch_register([memory.address], [SIZE])
    IN_HAND.attempt = object()  # type: ignore[assignment]
    say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        status = engine.batch_transfer_sync(
            order["session"], [memory.address], [order["address"]], [order["size"]]
        )
        say(status=status, failures=len(ledger.failures))


def leave(door: bool) -> None:
    """A fence of an engine that, with `door`, had one more way in, which stays open."""
    manager = Manager(Memory(0))
    opened = fence.engine_has(manager.engine)
    with socket.create_server((HOST, 0)) as left:
        if door:
            fence.record(manager.engine, opened | {f"port {left.getsockname()[1]}"})
        old = fence.switch(manager)
        try:
            fence.retire(old, lambda ports: ports)
        except fence.FenceError as error:
            say(opened=len(opened), error=str(error))
        else:
            say(opened=len(opened), again=len(fence.engine_has(manager.engine)))


if __name__ == "__main__":
    role, argument = sys.argv[1:3]
    if role == "receive":
        receive(argument)
    elif role == "send":
        send(argument == "once")
    else:
        leave(argument == "open")
