"""Where the anomaly guard touches stock: where a request ends, finds cached KV, or is stored."""

from __future__ import annotations

from functools import partial

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "spec-guard"

_both = partial(AttachPoint, NAME, "both")
_decode = partial(AttachPoint, NAME, "decode")
_prefill = partial(AttachPoint, NAME, "prefill")

_REQUEST = "sglang.srt.managers.schedule_batch:Req"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_OFFLOAD = "sglang.srt.disaggregation.decode_kvcache_offload_manager:DecodeKVCacheOffloadManager"
_OPENAI = "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase"
_RESPONSES = "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses"

FINISH = _both(
    f"{_REQUEST}.update_finish_state",
    ("new_accepted_len",),
    uses=(
        "spec_verify_ct",
        "spec_num_correct_drafts",
        "to_finish",
        "finished_reason",
        "skip_radix_cache_insert",
        "extra_key",
        "origin_input_ids_unpadded",
    ),
    first="0.5.13",
)
FINISH_BEFORE = _both(
    f"{_REQUEST}.check_finished",
    ("new_accepted_len",),
    uses=("spec_verify_ct", "to_finish", "finished_reason", "skip_radix_cache_insert"),
    last="0.5.12.post1",
)
REQUEST_INIT = _both(f"{_REQUEST}.__init__", ("rid", "origin_input_text"))
NEXT_ROUND = _both(f"{_REQUEST}.init_next_round_input", ("tree_cache",))
MATCH_PREFIX = _decode(
    "sglang.srt.disaggregation.decode:DecodePreallocQueue._match_prefix_and_lock", ("req",)
)
PREFETCH = _both(
    f"{_SCHEDULER}._prefetch_kvcache",
    ("req",),
    uses=("page_size", "attn_tp_cpu_group", "tp_cpu_group", "draft_worker", "forward_ct"),
)
SET_STATE = _both(f"{_SCHEDULER}.set_internal_state", ("recv_req",))
# Its own: how many drafts each verification of a request was offered.
CAPS = _both(
    f"{_REQUEST}.update_spec_cap_lens_histogram",
    ("cap_len",),
    uses=("spec_cap_lens_histogram",),
    first="0.5.16",
    wrapped=False,
)
TOKENIZED = AttachPoint(
    NAME,
    "server",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
    ("obj", "input_text"),
)
OFFLOAD = _decode(f"{_OFFLOAD}.offload_kv_cache", ("req",))
FINALIZE_OFFLOAD = _decode(f"{_OFFLOAD}.finalize_release_on_finish", ("req",))
BOOTSTRAP_ROUTES = _prefill(
    "sglang.srt.disaggregation.common.conn:CommonKVBootstrapServer._setup_routes"
)
ERROR_RESPONSES = tuple(
    AttachPoint(
        NAME,
        "server",
        f"{serving}.create_{kind}response",
        ("message", "err_type", "status_code"),
    )
    for serving in (_OPENAI, _RESPONSES)
    for kind in ("error_", "streaming_error_")
)

ATTACH_POINTS = (*catalogue(vars()), *ERROR_RESPONSES)
