"""Torch on a CPU: pinned memory is ordinary memory, streams and events do nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class Stream:
    """Work on it is already done, since a CPU runs in program order."""

    cuda_stream = 0
    stream_id = 0
    device_index = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def synchronize(self) -> None: ...

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return Event() if event is None else event

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_args: Any) -> None: ...


class Event:
    """Always reached."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, _stream: Any = None) -> None: ...

    def wait(self, _stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        """Milliseconds between two events: none."""
        return 0.0


_STREAM = Stream()


def _returning(value: Any) -> Callable[..., Any]:
    """A new function each time: Dynamo insists on one name per function object."""

    def stand_in(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return stand_in


def _no_context() -> Callable[..., Any]:
    @contextlib.contextmanager
    def stand_in(*_args: Any, **_kwargs: Any) -> Iterator[None]:
        yield

    return stand_in


def patch_torch(torch: ModuleType) -> None:
    """Replace what needs a CUDA device by what a CPU can do.  `is_available()` stays False."""
    for name in _FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self
    cuda = torch.cuda
    cuda.Stream = cuda.ExternalStream = Stream
    cuda.Event = Event
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _returning(_STREAM))
    for name in ("stream", "device"):
        setattr(cuda, name, _no_context())
    for name in ("synchronize", "set_device", "set_stream"):
        setattr(cuda, name, _returning(None))
