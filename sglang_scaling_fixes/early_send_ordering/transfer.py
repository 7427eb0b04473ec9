"""A backend's own sender, manager and transfer worker, run up to their first look at the pages.

The chunk goes the way of every chunk: the sender queues it through the manager, the worker
takes it up. Its page indices are an object that notices when the worker looks at it, which
is where a transfer begins. Nothing is sent.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.kv_poll import TRANSFERRING
from sglang_scaling_fixes.standin_objects import Anything, Empty, Lenient, No

BACKENDS = {"nixl": "Nixl", "mooncake": "Mooncake"}
"""Transfer backends that send early: package and prefix of its classes."""

_ROOM = 1
"""Any number: this manager has one room."""
_AGENT = "probe:1"


class Transfer:
    """One chunk through `backend`. `look()` is called when its transfer begins."""

    def __init__(self, backend: str, look: Callable[[], None]) -> None:
        name = BACKENDS[backend]
        module = importlib.import_module(f"sglang.srt.disaggregation.{backend}.conn")
        from sglang.srt.disaggregation.utils import DisaggregationMode

        self._queue: list[Any] = []
        self._working = False
        self._begun = False
        self._look = look
        self._chunk = chunk = _Indices(self)

        class Manager(Empty, getattr(module, f"{name}KVManager")):  # type: ignore[misc]
            def check_status(self, _room: int) -> int:
                return TRANSFERRING

            def update_status(self, *_args: Any) -> None: ...

        class Sender(Lenient, getattr(module, f"{name}KVSender")):  # type: ignore[misc]
            def _prepare_send_indices(self, *_args: Any, **_kwargs: Any) -> Any:
                return chunk, slice(0, 2), False, False

            def _record_transfer_indices(self, *_args: Any) -> None: ...

        peer = Lenient(
            room=_ROOM,
            agent_name=_AGENT,
            mooncake_session_id=_AGENT,
            dst_port=1,
            is_dummy=No(),
            dst_kv_indices=(0, 1),
        )
        self.manager = Manager(
            disaggregation_mode=DisaggregationMode.PREFILL,
            request_status={_ROOM: TRANSFERRING},
            transfer_infos={_ROOM: {_AGENT: peer}},
            transfer_queues=[self],
            decode_kv_args_table={_AGENT: Lenient(decode_tp_size=1, dst_attn_tp_size=1)},
            kv_args=Lenient(kv_data_ptrs=[1], engine_rank=0, state_types=[]),
            session_lock=contextlib.nullcontext(),
            failed_sessions=(),
            _staging_outstanding=collections.defaultdict(int),
            attn_tp_rank=0,
            attn_tp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            pp_rank=0,
            pp_size=1,
            prepare_send_state_indices=lambda indices: indices,
            _get_dsa_cache_transfer_skip_flags=lambda *_a: (False, False),
        )
        self.sender = Sender(
            kv_mgr=self.manager,
            bootstrap_room=_ROOM,
            chunk_id=0,
            curr_idx=0,
            num_kv_indices=sys.maxsize,
            trace_ctx=Anything(),
            _transfer_start_time=1.0,
        )

    @property
    def queued(self) -> bool:
        return bool(self._queue)

    def send(self, **more: Any) -> None:
        """The scheduler's part, with what else it says of the chunk.

        Raises `AttachError` if nothing was queued, and nothing read at once.
        """
        with contextlib.suppress(_Done):
            self.sender.send(self._chunk, **more)
        if not self._queue and not self._begun:
            raise AttachError(f"{type(self.sender).__mro__[2].__qualname__}.send queued nothing")

    def work(self) -> None:
        """The worker thread's part, in the calling thread. Nothing where none is queued."""
        if not self._queue:
            return
        with contextlib.suppress(_Done):
            type(self.manager).transfer_worker(self.manager, self, None)

    # -- as a transfer queue -----------------------------------------------------------

    def put(self, chunk: Any) -> None:
        self._queue.append(chunk)

    def get(self) -> Any:
        if not self._queue:
            raise _Done
        self._working = True
        return self._queue.pop()

    def looked(self, begins: bool = False) -> None:
        if begins or self._working:
            self._begun = True
            self._look()
            raise _Done


class _Done(BaseException):
    """Ends a transfer worker's endless loop, which survives every Exception."""


class _Indices:
    """The pages of a chunk."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def __len__(self) -> int:
        self._transfer.looked()
        return 2

    @property
    def size(self) -> int:
        """Asked for where the pages are put together, also in a release without workers."""
        self._transfer.looked(begins=True)
        return 2
