"""What was ordered and what was not: streams, events and accesses, fed to torch's CSAN.

CSAN (`torch.cuda._sanitizer.EventHandler`) keeps one vector clock per stream and reports two
accesses to one address, at least one a write, that no chain of records and waits connects. It
is pure Python; this module gives it what a GPU would: streams with a name, events, and kernels
that read and write *named regions*. A region is one buffer of the KV cache, and its unit of
access is the page, as it is for the runtime: a load of page 3 does not touch page 4.

The private torch API used: `EventHandler` and its `_handle_*` methods, `AccessType`, and the
fields of `UnsynchronizedAccessError` and `Access` (torch 2.9 to 2.14).
"""

from __future__ import annotations

import bisect
import itertools
import linecache
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.cuda._sanitizer import AccessType, EventHandler


@dataclass(frozen=True)
class Region:
    """One buffer: `pages` pages of `page_bytes` bytes from address `base`."""

    name: str
    base: int
    page_bytes: int
    pages: int

    @property
    def end(self) -> int:
        return self.base + self.page_bytes * self.pages

    def keys(self, start: int, end: int) -> range:
        """Addresses of the pages that the bytes from `start` up to `end` touch."""
        first = max(0, (start - self.base) // self.page_bytes)
        last = min(self.pages, -(-(end - self.base) // self.page_bytes))
        return range(self.base + first * self.page_bytes, self.base + last * self.page_bytes)[
            :: self.page_bytes
        ]


@dataclass(frozen=True)
class Side:
    """One of the two accesses of a race."""

    access: str
    """`"read"` or `"write"`."""
    operation: str
    stream: str
    frames: tuple[str, ...]
    """Where it was launched, `path:line function: source`, outermost first."""


@dataclass(frozen=True)
class Race:
    """Two accesses to one buffer that nothing orders; `earlier` was launched first."""

    region: str
    earlier: Side
    later: Side

    @property
    def missing_edge(self) -> str:
        return f"stream {self.later.stream!r} does not wait for stream {self.earlier.stream!r}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "buffer": self.region,
            "missing_edge": self.missing_edge,
            **{
                when: {
                    "access": side.access,
                    "operation": side.operation,
                    "stream": side.stream,
                    "stack": list(side.frames),
                }
                for when, side in (("earlier", self.earlier), ("later", self.later))
            },
        }


@dataclass
class Recorder:
    """One scenario's history. Exactly one is active at a time (`recording`)."""

    races: list[Race] = field(default_factory=list)
    accesses: int = 0

    def __post_init__(self) -> None:
        self._csan = EventHandler()
        self._names: dict[int, str] = {}
        self._ids = itertools.count(1)
        self._regions: list[Region] = []
        self._bases: list[int] = []
        self._thread: Stream | None = None
        self._seen: set[tuple[str, str, str, str, str]] = set()
        # The streams that are entered, the current one last.
        self.entered: list[Stream] = [Stream.__new__(Stream)]
        self.entered[0].adopt(self, "default")

    # -- buffers -------------------------------------------------------------------

    def watch(self, name: str, tensor: Any, *, page_bytes: int) -> None:
        """Record accesses to this buffer from now on. Buffers without bytes have none."""
        if tensor.nbytes == 0:
            return
        region = Region(name, tensor.data_ptr(), page_bytes, -(-tensor.nbytes // page_bytes))
        at = bisect.bisect(self._bases, region.base)
        self._bases.insert(at, region.base)
        self._regions.insert(at, region)

    def region_at(self, address: int) -> Region | None:
        at = bisect.bisect(self._bases, address) - 1
        if at < 0 or address >= self._regions[at].end:
            return None
        return self._regions[at]

    def pages(self, start: int, size: int) -> set[int]:
        """Keys of all watched pages that `size` bytes from address `start` touch."""
        found: set[int] = set()
        for region in self._regions:
            if region.base < start + size and start < region.end:
                found.update(region.keys(start, start + size))
        return found

    # -- kernels, streams, events ----------------------------------------------------

    def kernel(
        self,
        operation: str,
        *,
        reads: Iterable[int] = (),
        writes: Iterable[int] = (),
        stream: Stream | None = None,
    ) -> None:
        """A kernel on `stream` (default: the current one) that touches these pages."""
        written = set(writes)
        read = set(reads) - written
        if not read and not written:
            return
        self.accesses += 1
        errors = self._csan._handle_kernel_launch(
            (stream or self.current).id, read, written, set(), operation, _NoAliases()
        )
        for error in errors:
            self._add(error)

    @property
    def current(self) -> Stream:
        return self.entered[-1]

    def new_stream(self, name: str) -> int:
        number = next(self._ids)
        self._names[number] = name
        self._csan._handle_stream_creation(number)
        return number

    def new_event(self) -> int:
        number = next(self._ids)
        self._csan._handle_event_creation(number)
        return number

    def record(self, event: int, stream: Stream) -> None:
        self._csan._handle_event_record(event, stream.id)

    def wait(self, event: int, stream: Stream) -> None:
        self._csan._handle_event_wait(event, stream.id)

    def host_waits_for(self, event: int) -> None:
        """The calling thread waits: what it starts from now on is ordered behind the event.

        A thread that only issues transfers (`thread`) orders nothing but those.
        """
        if self._thread is not None:
            self.wait(event, self._thread)
        else:
            self._csan._handle_event_synchronization(event)

    @contextmanager
    def thread(self, name: str) -> Iterator[Stream]:
        """Inside, this is another host thread, and its stream is what it does itself."""
        self._thread = Stream(name=name)
        with self._thread:
            yield self._thread
        self._thread = None

    def synchronize(self, stream: Stream | None = None) -> None:
        if stream is None:
            self._csan._handle_device_synchronization()
        else:
            self._csan._handle_stream_synchronization(stream.id)

    def rename(self, stream: Stream, name: str) -> None:
        self._names[stream.id] = name

    def stream_name(self, number: int) -> str:
        return self._names.get(number, f"#{number}")

    # -- races -----------------------------------------------------------------------

    def _add(self, error: Any) -> None:
        region = self.region_at(error.data_ptr)
        assert region is not None
        earlier, later = self._side(error.previous_access), self._side(error.current_access)
        key = (region.name, earlier.operation, earlier.stream, later.operation, later.stream)
        if key not in self._seen:
            self._seen.add(key)
            self.races.append(Race(region.name, earlier, later))

    def _side(self, access: Any) -> Side:
        kind = "write" if access.type is AccessType.WRITE else "read"
        frames = tuple(_own_frames(access.stack_trace))
        return Side(kind, access.operator, self.stream_name(access.stream), frames)

    def raced_buffers(self) -> int:
        """On how many buffers a race was found."""
        return len({race.region for race in self.races})


class _NoAliases(dict[int, list[str]]):
    def __missing__(self, key: int) -> list[str]:
        return []


def _own_frames(trace: Sequence[Any], limit: int = 6) -> Iterator[str]:
    """The innermost frames inside SGLang or a scenario, `path:line function: source`."""
    frames = [f for f in trace if "/sglang/" in f.filename or "/racecheck/hazards" in f.filename]
    for frame in frames[-limit:]:
        cut = max(frame.filename.rfind("/sglang/"), frame.filename.rfind("/racecheck/"))
        source = linecache.getline(frame.filename, frame.lineno).strip()
        yield f"{frame.filename[cut + 1 :]}:{frame.lineno} {frame.name}: {source}"


# -- what stands in for torch.cuda -------------------------------------------------------

_active: Recorder | None = None


@contextmanager
def recording() -> Iterator[Recorder]:
    """A fresh recorder; everything made or launched inside belongs to it."""
    global _active  # noqa: PLW0603 - torch.cuda is global too
    assert _active is None, "one scenario at a time"
    _active = recorder = Recorder()
    try:
        yield recorder
    finally:
        _active = None


def active() -> Recorder:
    """The recorder of the scenario that runs. Outside of one, a throw-away."""
    return _active if _active is not None else Recorder()


class Stream:
    """A stand-in for `torch.cuda.Stream`."""

    id: int
    device_index = 0

    def __init__(self, *_args: Any, name: str = "", **_kwargs: Any) -> None:
        self.adopt(active(), name)

    def adopt(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self.id = recorder.new_stream(name)

    @property
    def cuda_stream(self) -> int:
        return self.id

    stream_id = cuda_stream

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu")

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._recorder.synchronize(self)

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        self._recorder.entered.append(self)
        return self

    def __exit__(self, *_args: Any) -> None:
        self._recorder.entered.pop()


class Event:
    """A stand-in for `torch.cuda.Event`. `query()` says True, as on a GPU that is done."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._recorder = active()
        self._id = self._recorder.new_event()

    def record(self, stream: Stream | None = None) -> None:
        self._recorder.record(self._id, stream or self._recorder.current)

    def wait(self, stream: Stream | None = None) -> None:
        self._recorder.wait(self._id, stream or self._recorder.current)

    def synchronize(self) -> None:
        self._recorder.host_waits_for(self._id)

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        return 0.0
