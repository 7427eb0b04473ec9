"""The early send of a cached prefix (prefill/decode disaggregation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sglang_scaling_fixes.early_send_ordering import probe, sends
from sglang_scaling_fixes.early_send_ordering.transfer import Transfer
from sglang_scaling_fixes.racecheck import kv_stack, lookup
from sglang_scaling_fixes.racecheck.hazards.hazard import Hazard, Scenario
from sglang_scaling_fixes.racecheck.kv_stack import PAGE
from sglang_scaling_fixes.racecheck.recorder import Recorder, Stream
from sglang_scaling_fixes.standin_objects import Lenient


def early_sends(backend: str) -> Callable[[], Iterator[Scenario]]:
    return lambda: iter([partial(_early_send, backend=backend)])


def _early_send(recorder: Recorder, backend: str) -> None:
    """The previous forward still writes the prefix that this batch's request sends early."""
    _require_early_send()
    stack = kv_stack.build(recorder, kv_stack.dsa_pool())
    slots = stack.allocator.alloc(2 * PAGE)
    pages = stack.kv_pages(slots)
    with stack.forward_batch(-1):
        recorder.kernel("forward writes KV", writes=pages)
    transfer = Transfer(
        backend, look=lambda: recorder.kernel("transfer worker reads KV", reads=pages)
    )
    scheduler = probe.prefill_scheduler(lambda _req: transfer.send(), stack.forward, PAGE)
    batch = probe.batch(transfer.sender, loading=False, prefix=len(slots))
    probe.run_early_sends(scheduler, batch)
    with recorder.thread("RDMA read"):
        transfer.work()


def early_sends_of_loads() -> Iterator[Scenario]:
    yield _early_send_of_load


def _early_send_of_load(recorder: Recorder) -> None:
    """A load started for this batch brings pages that a later request matched on the device.

    The reader is the best that could be: it waits for whatever event it is given.
    """
    _require_early_send()
    stack = kv_stack.build(recorder, kv_stack.dsa_pool())
    slots, _consumer = stack.load()
    nic = Stream(name="RDMA read")

    def send(req: Any) -> None:
        if (event := req.disagg_kv_sender._early_send_wait_event) is not None:
            event.wait(nic)
        recorder.kernel("send of the cached prefix", reads=stack.kv_pages(slots), stream=nic)

    scheduler = probe.prefill_scheduler(send, stack.forward, PAGE)
    probe.run_early_sends(scheduler, probe.batch(Lenient(), loading=True, prefix=len(slots)))


def _require_early_send() -> None:
    if not probe.sends_early():
        lookup.find(sends.MIXIN)
        raise lookup.NotThere("this release does not send cached prefixes early")


HAZARDS = (
    Hazard(
        "early-send-before-write-nixl",
        "does NIXL wait for the forward that still writes a prefix sent early?",
        early_sends("nixl"),
    ),
    Hazard(
        "early-send-before-write-mooncake",
        "does Mooncake wait for the forward that still writes a prefix sent early?",
        early_sends("mooncake"),
    ),
    Hazard(
        "early-send-before-load",
        "is a prefix sent early only once it is loaded?",
        early_sends_of_loads,
    ),
)
