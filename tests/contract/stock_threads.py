"""A release's own receive threads, run on messages, without the rest of the release.

The classes of a wheel's `disaggregation` package are made from their source. What they import from
anywhere else, other than the standard library and NumPy, is an object that allows everything. So
what is read of a message, and whether that ends the thread, is stock's own doing.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import functools
import importlib
import logging
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from types import ModuleType, SimpleNamespace
from typing import Any

from sglang_scaling_fixes.standin_objects import Anything, Lenient
from tests.contract.wheels import source

_PACKAGE = "sglang.srt.disaggregation"
_REAL = {*sys.stdlib_module_names, "numpy"} - {"__future__"}


class NothingMore(BaseException):
    """All messages have been read. No thread of stock's catches it."""


class _Globals(dict[str, Any]):
    """Of a module: a name that it would have from elsewhere allows everything."""

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return Anything()


class _Release:
    """The modules of one release that anything was asked of."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, _Globals] = {}
        self.threads: list[Callable[[], None]] = []

    def module(self, name: str) -> _Globals:
        if name in self._modules:
            return self._modules[name]
        called = f"stock {name}"
        own = {**vars(builtins), "__import__": self._import}
        names = self._modules[name] = _Globals(__name__=called, __builtins__=own)
        sys.modules[called] = ModuleType(called)  # where dataclasses look for their own module
        path = self._root.joinpath(*name.split("."))
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        for statement in ast.parse(path.read_text()).body:
            self._run(statement, names)
        names |= {"logger": logging.getLogger("stock"), "threading": self}
        return names

    def _import(self, name: str, *args: Any) -> Any:
        """What stock imports in the midst of a function."""
        if name.startswith(_PACKAGE):
            return Lenient(**self.module(name))
        real = name.partition(".")[0] in _REAL
        return builtins.__import__(name, *args) if real else Anything()

    def Thread(self, target: Callable[[], None], **_: Any) -> Any:
        """In place of `threading`'s: none is started."""
        self.threads.append(target)
        return SimpleNamespace(start=lambda: None)

    def _run(self, statement: ast.stmt, names: _Globals) -> None:
        if isinstance(statement, ast.ImportFrom):
            if (statement.module or "").startswith(_PACKAGE):
                theirs = self.module(str(statement.module))
                found = {a.asname or a.name: theirs.get(a.name) for a in statement.names}
                names.update({name: value for name, value in found.items() if value is not None})
                return
            if (statement.module or "").split(".")[0] not in _REAL:
                return
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.name.split(".")[0] in _REAL:
                    names[alias.asname or alias.name] = importlib.import_module(alias.name)
            return
        unit = ast.Module([statement], [])
        flags = __future__.annotations.compiler_flag
        try:
            exec(compile(unit, names["__name__"], "exec", flags), names)
        except Exception:
            return  # it needs what is not here, and is not needed itself


@functools.lru_cache(maxsize=1)
def _read(release: str) -> _Release:
    return _Release(source(release))


def manager(release: str) -> Any:
    """A stock KV manager that was never started, with what its receive threads write to."""
    stock = _read(release).module(f"{_PACKAGE}.mooncake.conn")["MooncakeKVManager"]
    stock.__abstractmethods__ = frozenset()
    made: Any = object.__new__(type("Manager", (Lenient, stock), {}))
    vars(made).update(
        server_args=Lenient(),
        request_status={},
        prefill_response_tracker=defaultdict(set),
        required_prefill_response_num_table=defaultdict(lambda: 1),
        failure_records={},
        failure_lock=Lock(),
        transfer_infos={},
        decode_kv_args_table={},
        req_to_decode_prefix_len={},
        session_lock=Lock(),
        failed_sessions=set(),
        session_failures={},
        _deferred_abort_ack_tracker={},
        _deferred_ack_targets={},
        _deferred_ack_poisoned_rooms=set(),
        _staging_outstanding=defaultdict(int),
        _worker_threads=[],
        kv_args=SimpleNamespace(aux_data_ptrs=[0, 0], aux_item_lens=[0, 0]),
        disaggregation_mode=SimpleNamespace(value="decode"),
        dcp_size=1,
        dcp_rank=0,
        _chunk_writer_counts=defaultdict(lambda: defaultdict(list)),
        _staging_handler=SimpleNamespace(
            _room_to_decode_req={}, handle_chunk_arrived=lambda *_: False
        ),
        _staging_ctx=SimpleNamespace(watermark_cv=Anything(), remote_watermarks={}),
        _stopped=False,
    )
    made._publish_peer_registration = made.decode_kv_args_table.__setitem__
    return made


def receive(release: str, stock: Any, role: str, messages: Iterable[list[bytes]]) -> None:
    """Let the receive thread of `role` read `messages`; raises what would end it."""
    incoming = deque(messages)

    def recv_multipart(*_: Any, **__: Any) -> list[bytes]:
        if not incoming:
            raise NothingMore
        return incoming.popleft()

    stock.server_socket = SimpleNamespace(recv_multipart=recv_multipart)
    threads = _read(release).threads
    threads.clear()
    getattr(stock, f"start_{role}_thread")()
    name = {"decode": "decode_thread", "prefill": "bootstrap_thread"}[role]
    (loop,) = (target for target in threads if target.__name__ == name)
    try:
        loop()
    except NothingMore:
        assert not incoming
