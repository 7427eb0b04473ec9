"""One decode rank: the real decode side and gate over stand-ins for stock's manager and queue."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.inbox import Word
from sglang_scaling_fixes.reclaim.decode.peers import OutgoingSocket
from sglang_scaling_fixes.reclaim.decode.side import DecodeSide
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.quarantine import GRACE_S

torch = pytest.importorskip("torch")
allocators = pytest.importorskip("sglang.srt.mem_cache.allocator")
utils = pytest.importorskip("sglang.srt.disaggregation.utils")
stock_decode = pytest.importorskip("sglang.srt.disaggregation.decode")

OLD, NEW = "192.0.2.2:1", "192.0.2.2:2"
POOL = 100
PREFILL = "192.0.2.1:8998"
"""The prefill instance that requests name, unless they name another."""


class Socket:
    def __init__(self) -> None:
        self.sent: list[list[bytes]] = []
        self.full = False

    def send_multipart(self, frames: list[bytes], *_: Any, **__: Any) -> None:
        if self.full:
            raise zmq.Again
        self.sent.append(frames)


class Manager(SimpleNamespace):
    def __init__(self, **server_args: Any) -> None:
        super().__init__(
            server_args=SimpleNamespace(**server_args),
            server_socket=SimpleNamespace(),
            local_ip="192.0.2.2",
            rank_port=1,
            kv_args=SimpleNamespace(state_types=[]),
            request_status={},
            prefill_response_tracker={},
            session=OLD,
            failures={},
        )

    def get_session_id(self) -> str:
        return str(self.session)

    def record_failure(self, room: int, reason: str) -> None:
        self.failures[room] = reason

    def update_status(self, room: int, status: int) -> None:
        self.request_status[room] = status


def preallocation_queue(tokens: Any, metadata: Any) -> SimpleNamespace:
    """What the gate reads of stock's queue, with these two allocators and no other TP rank."""
    return SimpleNamespace(
        token_to_kv_pool_allocator=tokens,
        req_to_metadata_buffer_idx_allocator=metadata,
        gloo_group=None,
        metadata_buffers=None,
        tree_cache=None,
    )


class Decode:
    """One decode rank with one prefill rank it has registered at."""

    def __init__(
        self, config: Config, *, pool: int = POOL, metadata: int = 8, **server_args: Any
    ) -> None:
        self.prefill = socket.create_server(("127.0.0.1", 0))
        """Alive: its port is open."""
        self.port = self.prefill.getsockname()[1]
        self.rank = f"127.0.0.1:{self.port}"
        self.manager = Manager(**server_args)
        self.guard = DecodeSide(self.manager, config).install()
        self.tokens = allocators.TokenToKVPoolAllocator(pool, torch.float32, "cpu", None, False)
        self.aux = utils.ReqToMetadataIdxAllocator(metadata)
        self.guard.install_gate(preallocation_queue(self.tokens, self.aux))
        self.socket = Socket()
        self.tap = OutgoingSocket(
            self.socket,
            self.rank,
            lambda: (self.socket, threading.Lock()),
            self.guard.peers,
        )
        self.tap.send_multipart([b"None", b"192.0.2.2", b"1", OLD.encode(), b"pointers"])
        self.answers: list[str] = []
        """Messages of the refusals."""

    def expose(
        self, room: int, count: int, session: str = OLD, ranks: int = 1
    ) -> tuple[Any, Any, int]:
        """A request of `count` token slots, its destinations sent as stock sends them.

        Only the first of its `ranks` prefill ranks is there to get them.
        """
        slots, aux = self.tokens.alloc(count), self.aux.alloc()
        infos = [
            {"rank_ip": f"127.0.0.{rank + 1}", "rank_port": self.port, "is_dummy": False}
            for rank in range(ranks)
        ]
        receiver = SimpleNamespace(
            bootstrap_room=room,
            bootstrap_infos=infos,
            conclude_state=None,
            sglang_scaling_fixes_prefill=PREFILL,
        )
        self.manager.request_status[room] = 2

        def stock(receiver: Any, *_: Any) -> None:
            room = str(receiver.bootstrap_room).encode()
            self.tap.send_multipart([room, b"", b"1", session.encode(), b"", b"", b"", b"1"])

        self.guard.send_metadata(stock, receiver, slots.numpy().astype(np.int32), aux, [])
        return receiver, slots, aux

    def give_up(self, receiver: Any, slots: Any, aux: int, age: float = GRACE_S + 1) -> Exposure:
        """The owner gave up `age` seconds ago, and stock frees everything."""
        exposure: Exposure = receiver.sglang_scaling_fixes_exposure
        self.guard.clearing(receiver)
        exposure.gave_up_at = time.monotonic() - age
        self.tokens.free(slots)
        self.aux.free(aux)
        return exposure

    def hears(self, message: Word) -> None:
        assert self.guard.inbox.read([messages.encode(message)]) is None

    def refused(
        self, prefill: str, room: int = 1, tokens: int = 1, *, answer: int = 0, reserved: int = 0
    ) -> bool:
        """Whether a new request that names this prefill instance is refused.

        `answer`: its `max_new_tokens`; `reserved`: what stock wants free beside every request.
        """
        host, _, port = prefill.rpartition(":")
        request = SimpleNamespace(
            bootstrap_host=host,
            bootstrap_port=int(port),
            bootstrap_room=room,
            return_logprob=False,
            origin_input_ids=[1] * tokens,
            sampling_params=SimpleNamespace(max_new_tokens=answer),
        )
        streamer = SimpleNamespace(stream_output=lambda *_: None)
        queue = stock_decode.DecodePreallocQueue.__new__(stock_decode.DecodePreallocQueue)
        queue.scheduler = SimpleNamespace(output_streamer=streamer)
        queue.num_reserved_decode_tokens = reserved

        def prepare_abort(request: Any, message: str, status_code: int) -> None:
            assert status_code == 503
            self.answers.append(message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "prepare_abort", prepare_abort)
            return self.guard.refused(queue, request)

    def asks(self) -> int:
        said = (messages.strip_trailer(frames)[1] for frames in self.socket.sent)
        return sum(isinstance(message, messages.Abort) for message in said)

    def free(self) -> tuple[int, int]:
        return self.tokens.available_size(), self.aux.available_size()
