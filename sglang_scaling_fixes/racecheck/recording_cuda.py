"""What a CPU lacks to run the cache classes, supplied as recorders.

Streams and events come from `recorder`; kernels that exist only as CUDA or Triton code are
replaced by functions that record which pages they read and write, taken from their own
arguments. Everything else (indexing, copies, views) is torch on the CPU, seen through a
dispatch mode. Patches this process for good: it runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from sglang_scaling_fixes.lab.standins import cuda, hidden, kernels
from sglang_scaling_fixes.racecheck.recorder import Event, Stream, active


def install() -> None:
    """Make `torch.cuda` record. Call before SGLang is imported."""
    hidden.install()
    kernels.install()
    import torch

    cuda.patch_torch(torch)
    device = torch.cuda
    device.Stream = device.ExternalStream = Stream
    device.Event = Event
    device.current_stream = device.default_stream = lambda *_a, **_k: active().current
    device.stream = lambda stream: stream if stream is not None else contextlib.nullcontext()
    device.synchronize = lambda *_a, **_k: active().synchronize()
    device.set_stream = lambda stream: active().entered.__setitem__(-1, stream)
    registered = SimpleNamespace(cudaHostRegister=_registers, cudaHostUnregister=_registers)
    device.cudart = lambda: registered
    torch.get_device_module = lambda *_a, **_k: device
    torch.Tensor.record_stream = lambda *_a: None  # keeps memory, orders nothing
    _tolerate_known_models()
    _have_memory()


def _registers(*_args: Any) -> int:
    return 0


def _tolerate_known_models() -> None:
    """A release may register a model type that a newer Transformers has by itself."""
    from transformers import AutoConfig

    register = AutoConfig.register
    AutoConfig.register = staticmethod(lambda name, config, **_: register(name, config, True))


_PLENTY = 1 << 45


def _have_memory() -> None:
    """Pools of some megabytes are refused where less than 10 GB of host memory are free."""
    import psutil

    plenty = SimpleNamespace(total=_PLENTY, available=_PLENTY)
    psutil.virtual_memory = lambda: plenty


# -- torch operations ---------------------------------------------------------------------


@contextlib.contextmanager
def torch_operations() -> Iterator[None]:
    """Record what torch itself reads and writes inside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recording(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            _record_operation(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    with Recording():
        yield


def _record_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    reads: set[int] = set()
    writes: set[int] = set()
    for position, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is not None and not alias.is_write:
            continue  # a view: nothing is touched
        value = kwargs.get(argument.name, args[position] if position < len(args) else None)
        pages = touched(value, _rows(func, args) if position == 0 else None)
        (writes if alias is not None else reads).update(pages)
    active().kernel(str(func.__name__), reads=reads, writes=writes)


def _rows(func: Any, args: tuple[Any, ...]) -> Any:
    """Row indices of an indexed read or write, None for one of everything."""
    name = func.__name__.split(".")[0]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return args[1][0]
    if name == "index_select" and args[1] == 0:
        return args[2]
    return None


def touched(value: Any, rows: Any = None) -> set[int]:
    """Pages of the watched buffers behind a tensor or a list of tensors."""
    import torch

    if isinstance(value, list | tuple):
        return set().union(*map(touched, value)) if value else set()
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return set()
    item = value.element_size()
    base = value.data_ptr()
    if rows is not None and rows.dtype in (torch.int32, torch.int64):
        return _row_pages(base, value.stride(0) * item, rows)
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return active().pages(base, (last + 1) * item)


def _row_pages(base: int, row_bytes: int, rows: Any) -> set[int]:
    found: set[int] = set()
    for row in set(rows.flatten().tolist()):
        found |= active().pages(base + row * row_bytes, row_bytes)
    return found


# -- kernels ------------------------------------------------------------------------------

_TRANSFER = re.compile(r"\btransfer_kv_\w+")
_BUFFERS = re.compile(r"(src|dst)(_k|_v)?(_layers)?$")


_BY_SLOT = (
    "set_mla_kv_buffer_triton",
    "set_mla_kv_buffer_dcp_sharded_triton",
    "get_mla_kv_buffer_triton",
)
"""Kernels that take a KV buffer and its slots first."""

_replaced: set[str] = set()


def replace_kernels() -> None:
    """Give every loaded SGLang module that uses a GPU-only kernel its recorder.

    Called again whenever a release may have imported more of itself.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("sglang.") or not isinstance(module, ModuleType):
            continue
        if name in _replaced:
            continue
        _replaced.add(name)
        if hasattr(module, "host_memory_budget_bytes"):
            vars(module)["host_memory_budget_bytes"] = lambda *_: _PLENTY
        if name.startswith("sglang.srt.mem_cache."):
            for transfer in _transfers(module):
                setattr(module, transfer, _transfer(transfer))
        if name.endswith((".index_buf_accessor", ".dsa_index_k_cache")):
            for reader in ("GetK", "GetS", "GetKAndS"):
                if hasattr(module, reader):
                    getattr(module, reader).execute = _index_reader(reader)
            if hasattr(module, "SetKAndS"):
                module.SetKAndS.execute = _index_writer()
        for kernel in _BY_SLOT:
            if hasattr(module, kernel):
                setattr(module, kernel, _by_slot(kernel))


def _transfers(module: ModuleType) -> set[str]:
    try:
        return set(_TRANSFER.findall(Path(module.__file__ or "").read_text()))
    except OSError:
        return set()


def _transfer(name: str) -> Callable[..., None]:
    """A copy kernel between host and device, by the names of its arguments.

    `src*` and `dst*` are a buffer, a list of buffers, or a tensor of buffer addresses;
    `*_indices` are rows of `item_size` bytes.
    """

    def transfer(**given: Any) -> None:
        sides: dict[str, set[int]] = {"src": set(), "dst": set()}
        for argument, value in given.items():
            if argument in ("src_indices", "dst_indices"):
                continue
            if (match := _BUFFERS.match(argument)) is not None:
                rows = given[f"{match[1]}_indices"]
                for base in _addresses(value):
                    sides[match[1]] |= _row_pages(base, int(given["item_size"]), rows)
            elif argument not in ("item_size", "num_layers"):
                raise NotImplementedError(f"{name}({argument}=...) is not recorded")
        active().kernel(name, reads=sides["src"], writes=sides["dst"])

    return transfer


def _addresses(value: Any) -> list[int]:
    import torch

    if isinstance(value, list | tuple):
        return [tensor.data_ptr() for tensor in value]
    if value.dtype == torch.uint64:
        return [int(address) for address in value.tolist()]
    return [value.data_ptr()]


def _index_reader(name: str) -> Any:
    """A reader of index-K pages; what it returns does not matter here."""

    def execute(cls: type, *args: Any, **given: Any) -> tuple[None, None]:
        buffer = given["buf"] if "buf" in given else args[1]
        rows = given["page_indices"]
        row_bytes = buffer.stride(0) * buffer.element_size()
        active().kernel(name, reads=_row_pages(buffer.data_ptr(), row_bytes, rows))
        return None, None

    return classmethod(execute)


def _index_writer() -> Any:
    """A writer of index-K tokens: a page at a time, as everything here."""

    def execute(_cls: type, /, *, pool: Any, buf: Any, loc: Any, **_keys: Any) -> None:
        row_bytes = buf.stride(0) * buf.element_size()
        rows = loc // pool.page_size
        active().kernel("SetKAndS", writes=_row_pages(buf.data_ptr(), row_bytes, rows))

    return classmethod(execute)


def _by_slot(name: str) -> Callable[..., None]:
    def kernel(kv_buffer: Any, loc: Any, *_keys: Any, **_how: Any) -> None:
        pages, writes = touched(kv_buffer, loc), name.startswith("set_")
        active().kernel(name, reads=() if writes else pages, writes=pages if writes else ())

    return kernel
