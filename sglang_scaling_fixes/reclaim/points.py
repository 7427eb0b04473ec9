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
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_UPDATER_BEFORE = "sglang.srt.managers.scheduler_update_weights_mixin:SchedulerUpdateWeightsMixin"
_FLUSH = "sglang.srt.managers.scheduler_components.flush_wrapper:SchedulerFlushWrapper"

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
        "queue",
        "transfer_queue",
        "retracted_queue",
    ),
)
QUEUE_ADD = _decode(f"{_QUEUE}.add", ("req", "is_retracted"), uses=("num_reserved_decode_tokens",))
PREPARE_ABORT = _decode(
    f"{_UTILS}:prepare_abort", ("req", "error_message", "status_code"), wrapped=False
)
CREATE_RECEIVER = _decode(f"{_QUEUE}._create_receiver_and_enqueue", ("req",))
PROCESS_REQUESTS = _decode(f"{_SCHEDULER}.process_input_requests")
FULLY_IDLE = _decode(
    f"{_SCHEDULER}.is_fully_idle", uses=("tp_cpu_group", "running_batch", "waiting_queue")
)
RESUME_RETRACTED = _decode(f"{_QUEUE}.resume_retracted_reqs")
SEND_METADATA = _decode(
    f"{_RECEIVER}.send_metadata",
    ("kv_indices", "aux_index", "state_indices"),
    uses=("bootstrap_infos", "bootstrap_room", "kv_mgr", "conclude_state"),
)
RECEIVER_POLL = _decode(f"{_RECEIVER}.poll", uses=("conclude_state", "kv_mgr"))
# Called by stock's poll; for one poll of ours another object answers.
CHECK_STATUS = _decode(f"{_MANAGER}.check_status", ("bootstrap_room",), wrapped=False)
RECEIVER_CLEAR = _decode(f"{_RECEIVER}.clear")
FAIL_REQUEST = _decode(
    "sglang.srt.disaggregation.decode:prepare_abort", ("req", "error_message", "status_code")
)
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

# -- decode: operations that need an idle server -----------------------------------------


def _moved(now: str, before: str) -> tuple[AttachPoint, AttachPoint]:
    """A place, and where it was up to 0.5.12.post1."""
    return _decode(now, first="0.5.13"), _decode(before, last="0.5.12.post1")


def _updater(method: str) -> tuple[AttachPoint, AttachPoint]:
    return _moved(f"{_UPDATER}.{method}", f"{_UPDATER_BEFORE}.{method}")


RELEASE_MEMORY = _updater("release_memory_occupation")
RESUME_MEMORY = _updater("resume_memory_occupation")
UPDATE_WEIGHTS = tuple(
    _updater(f"update_weights_from_{source}") for source in ("disk", "distributed", "tensor", "ipc")
)
FLUSH = _moved(f"{_FLUSH}.handle", f"{_SCHEDULER}.flush_cache_wrapped")
# In the main process: what all schedulers answered.
_answers = partial(AttachPoint, NAME, "server")
ANSWERS = (
    _answers("sglang.srt.managers.communicator:FanOutCommunicator.__call__"),
    # Releases that load no plugins: in a tree with the patch plugin-loader.
    _answers(
        "sglang.srt.managers.tokenizer_communicator_mixin:_Communicator.__call__",
        first="0.5.10",
        last="0.5.10.post1",
    ),
)
ALTERNATIVES = (RELEASE_MEMORY, RESUME_MEMORY, *UPDATE_WEIGHTS, FLUSH, ANSWERS)
"""Of each a release has one."""
ATTACH_STORAGE = _decode(f"{_SCHEDULER}.attach_hicache_storage_wrapped")
DETACH_STORAGE = _decode(f"{_SCHEDULER}.detach_hicache_storage_wrapped")

# -- decode: the lock on a prefix that requests share --------------------------------------

_TREE = "sglang.srt.mem_cache.base_prefix_cache"
_since_prefix_match = partial(_decode, wrapped=False, first="0.5.13")
TREE_LOCK = _since_prefix_match(f"{_TREE}:BasePrefixCache.inc_lock_ref", ("node",))
TREE_UNLOCK = _since_prefix_match(f"{_TREE}:BasePrefixCache.dec_lock_ref", ("node", "params"))
LOCK_RECEIPT = _since_prefix_match(f"{_TREE}:IncLockRefResult.to_dec_params")
PREFIX_MATCH = _since_prefix_match(
    "sglang.srt.disaggregation.decode_hicache_mixin:DecodePrefixMatch.needs_local_restore",
    uses=("prefix_indices", "last_device_node"),
)
DECODE_REQUEST = _since_prefix_match(
    "sglang.srt.disaggregation.decode:DecodeRequest.seqlen", uses=("prefix_match", "req")
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
SENDER_CLEAR = _prefill(f"{_SENDER}.clear", uses=("bootstrap_room", "conclude_state"))
SENDER_ABORT = _prefill(f"{_SENDER}.abort")
ADD_REQUEST = _prefill(f"{_SCHEDULER}._add_request_to_queue", ("req",))
ABORT_REQUEST = _prefill(f"{_SCHEDULER}.abort_request", ("recv_req",), uses=("waiting_queue",))
# Later releases take such requests out by `abort_request`.
WAITING_TIMEOUT = _prefill(
    f"{_SCHEDULER}._abort_on_waiting_timeout", uses=("waiting_queue",), last="0.5.19"
)
UPDATE_STATUS = _prefill(f"{_MANAGER}.update_status", ("bootstrap_room", "status"), wrapped=False)
RECORD_FAILURE = _prefill(
    f"{_MANAGER}.record_failure", ("bootstrap_room", "failure_reason"), wrapped=False
)

ATTACH_POINTS = (*catalogue(vars()), *(point for pair in ALTERNATIVES for point in pair))
