"""Where safe reclaim touches stock: the decode side, then the prefill side."""

from __future__ import annotations

from functools import partial

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "safe-reclaim"

_decode = partial(AttachPoint, NAME, "decode")
_prefill = partial(AttachPoint, NAME, "prefill")

_QUEUE = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
_TRANSFERS = "sglang.srt.disaggregation.decode:DecodeTransferQueue"
_MIXIN = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin"
_UTILS = "sglang.srt.disaggregation.utils"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_MANAGER = "sglang.srt.disaggregation.mooncake.conn:MooncakeKVManager"
_RECEIVER = "sglang.srt.disaggregation.mooncake.conn:MooncakeKVReceiver"
_SENDER = "sglang.srt.disaggregation.mooncake.conn:MooncakeKVSender"

# -- decode: exposure, gate, tick --------------------------------------------------------

QUEUE_INIT = _decode(
    f"{_QUEUE}.__init__",
    uses=(
        "token_to_kv_pool_allocator",
        "req_to_metadata_buffer_idx_allocator",
        "kv_manager",
        "scheduler",
        "gloo_group",
        "metadata_buffers",
        "tree_cache",
    ),
)
QUEUE_ADD = _decode(f"{_QUEUE}.add", ("req", "is_retracted"))
PREPARE_ABORT = _decode(
    f"{_UTILS}:prepare_abort", ("req", "error_message", "status_code"), wrapped=False
)
CREATE_RECEIVER = _decode(f"{_QUEUE}._create_receiver_and_enqueue", ("req",))
PROCESS_REQUESTS = _decode(f"{_SCHEDULER}.process_input_requests")
FULLY_IDLE = _decode(f"{_SCHEDULER}.is_fully_idle")
SEND_METADATA = _decode(
    f"{_RECEIVER}.send_metadata",
    ("kv_indices", "aux_index", "state_indices"),
    uses=("bootstrap_infos", "bootstrap_room", "kv_mgr", "conclude_state"),
)
RECEIVER_POLL = _decode(f"{_RECEIVER}.poll", uses=("conclude_state",))
RECEIVER_CLEAR = _decode(f"{_RECEIVER}.clear")
COMMIT = _decode(f"{_TRANSFERS}._commit_transfer_to_req", ("decode_req",))
RECEIVER_CONNECT = _decode(f"{_RECEIVER}._connect_to_bootstrap_server", ("bootstrap_info",))
FREE_METADATA = _decode(f"{_UTILS}:ReqToMetadataIdxAllocator.free", ("free_index",), wrapped=False)
DECODE_THREAD = _decode(
    f"{_MANAGER}.start_decode_thread",
    uses=(
        "server_socket",
        "request_status",
        "local_ip",
        "rank_port",
        "prefill_response_tracker",
        "get_session_id",
        "register_buffer_to_engine",
        "update_status",
        "record_failure",
    ),
)
# The fence makes a second one like it and moves its parts over.
ENGINE_INIT = _decode(
    "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
    ":MooncakeTransferEngine.__init__",
    ("hostname", "gpu_id", "ib_device"),
    uses=("engine", "session_id", "hostname", "gpu_id", "ib_device", "batch_register"),
)

# -- prefill: binding, accounting, drain -------------------------------------------------

PREFILL_THREAD = _prefill(
    f"{_MANAGER}.start_prefill_thread", uses=("server_socket", "transfer_queues", "request_status")
)
TRANSFER_WORKER = _prefill(f"{_MANAGER}.transfer_worker", ("queue", "executor"))
INIT_ENGINE = _prefill(f"{_MANAGER}.init_engine", uses=("engine",))
# Called by the probe: stock's own write.
TRANSFER_DATA = _prefill(
    f"{_MANAGER}._transfer_data", ("mooncake_session_id", "transfer_blocks"), wrapped=False
)
MANAGER_CONNECT = _prefill(f"{_MANAGER}._connect", ("endpoint", "is_ipv6"))
SENDER_INIT = _prefill(f"{_SENDER}.__init__")
SENDER_SEND = _prefill(f"{_SENDER}.send", ("kv_indices", "state_indices"))
SEND_CHUNK = _prefill(f"{_MIXIN}.send_kv_chunk", ("req",))
SENDER_POLL = _prefill(f"{_SENDER}.poll", uses=("bootstrap_room",))
SENDER_CLEAR = _prefill(f"{_SENDER}.clear")
UPDATE_STATUS = _prefill(f"{_MANAGER}.update_status", ("bootstrap_room", "status"), wrapped=False)
RECORD_FAILURE = _prefill(
    f"{_MANAGER}.record_failure", ("bootstrap_room", "failure_reason"), wrapped=False
)

ATTACH_POINTS = catalogue(vars())
