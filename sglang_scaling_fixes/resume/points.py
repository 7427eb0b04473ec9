"""Where resume touches stock: where HTTP becomes a request, is queued, sampled and sent."""

from __future__ import annotations

from functools import partial

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "resume"

_both = partial(AttachPoint, NAME, "both")
_server = partial(AttachPoint, NAME, "server")

_TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
_GRAMMARS = "sglang.srt.constrained.grammar_manager:GrammarManager"
_REQUEST = "sglang.srt.managers.schedule_batch:Req"

# -- main process --------------------------------------------------------------------------

GENERATE = _server(f"{_TOKENIZER}.generate_request", ("obj", "request"))
TOKENIZED = _server(
    f"{_TOKENIZER}._tokenize_one_request",
    ("obj",),
    uses=("rid_to_state", "tokenizer"),
)
OUTPUT = _server(f"{_TOKENIZER}._handle_batch_output", ("recv_obj",), uses=("rid_to_state",))

# -- scheduler -----------------------------------------------------------------------------

# Every request that was not refused passes here, right before it is queued.
QUEUED = _both(f"{_GRAMMARS}.process_req_with_grammar", ("req",), uses=("scheduler",))
GRAMMAR_READY = _both(f"{_GRAMMARS}.get_ready_grammar_requests")
SAMPLING = _both(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.from_schedule_batch",
    ("batch", "vocab_size"),
)
STREAM = _both(
    "sglang.srt.managers.scheduler_components.output_streamer"
    ":SchedulerOutputStreamer.stream_output",
    ("reqs", "return_logprob", "skip_req"),
    first="0.5.13",
)
STREAM_BEFORE = _both(
    "sglang.srt.managers.scheduler_output_processor_mixin"
    ":SchedulerOutputProcessorMixin.stream_output",
    ("reqs", "return_logprob", "skip_req"),
    last="0.5.12.post1",
)
# Decode of a pair: the transferred KV becomes a batch.
PREBUILT = AttachPoint(
    NAME,
    "decode",
    "sglang.srt.disaggregation.decode_schedule_batch_mixin"
    ":ScheduleBatchDisaggregationDecodeMixin.process_prebuilt",
)

# -- called, not wrapped -------------------------------------------------------------------
#
# So are the end of a request, which the guard lists, and its abort, which safe reclaim lists.

STOP_PREFIX = _both(
    f"{_REQUEST}.check_match_stop_str_prefix",
    uses=(
        "origin_input_ids",
        "output_ids",
        "finished_reason",
        "finished_len",
        "to_finish",
        "send_output_token_logprobs_offset",
        "sampling_params",
    ),
    wrapped=False,
)
RETRACT = _both(f"{_REQUEST}.reset_for_retract", wrapped=False)

ATTACH_POINTS = catalogue(vars())
