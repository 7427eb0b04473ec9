"""Where early-send ordering touches stock: a prefill's early sends, and NIXL's way of a chunk.

A point is wrapped only where a probe finds that the release does not wait there by itself.
"""

from __future__ import annotations

from functools import partial

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "early-send-ordering"

_prefill = partial(AttachPoint, NAME, "prefill")

MIXIN = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin"
NIXL = "sglang.srt.disaggregation.nixl.conn"

EARLY_SEND = _prefill(f"{MIXIN}.maybe_send_cached_prefix_chunk", ("req",), first="0.5.15")
RUN_BATCH = _prefill("sglang.srt.managers.scheduler:Scheduler.run_batch", ("batch",))
NIXL_SEND = _prefill(f"{NIXL}:NixlKVSender.send", ("kv_indices",), first="0.5.16")
NIXL_ADD_REQUEST = _prefill(
    f"{NIXL}:NixlKVManager.add_transfer_request",
    ("bootstrap_room",),
    uses=("transfer_queues",),
    first="0.5.16",
)
NIXL_WORKER = _prefill(f"{NIXL}:NixlKVManager.transfer_worker", ("queue",), first="0.5.16")

ATTACH_POINTS = catalogue(vars())
