"""Resume in a scheduler: a new request becomes one that has generated the given tokens already.

Alone, it is left as stock leaves a request that it retracted: prompt and output are computed again
by one prefill, and the next token is sampled behind them. In a prefill/decode pair stock transfers
the KV of a prompt, so there the given tokens are part of the prompt until the KV has arrived.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from sglang_scaling_fixes.metrics import Metrics
from sglang_scaling_fixes.resume import penalties, wire
from sglang_scaling_fixes.resume.metrics import RESUME

KEY = wire.FIELD
_MARK = "sglang_scaling_fixes_resumed"
_ALONE, _DECODE = "null", "decode"


@dataclass
class Past:
    """What a resumed request generated before, and how far it has been taken up."""

    ids: list[int]
    in_prompt: bool = False
    """The tokens are at the end of `origin_input_ids`, and not in `output_ids`."""
    told: bool = False
    """Whether the main process knows of the given tokens."""


@dataclass
class Counts:
    """Of this process. `is_reporting_rank`: whether this rank counts for its group."""

    metrics: Metrics
    is_reporting_rank: bool = True

    def inc(self, name: str, by: int = 1) -> None:
        if self.is_reporting_rank:
            self.metrics.inc(name, by=by)


counts = Counts(Metrics(RESUME, None))
_untold: weakref.WeakSet[Any] = weakref.WeakSet()
"""Resumed requests that have not sent anything."""


def past(req: Any) -> Past | None:
    found: Past | None = req.__dict__.get(_MARK)
    return found


# -- where it is queued --------------------------------------------------------------------


def queued(stock: Callable[..., Any], manager: Any, req: Any) -> Any:
    """In place of `process_req_with_grammar`: True where the request is not to be queued now."""
    ids = _take(req)
    waits = stock(manager, req)
    if ids is None or req.to_finish is not None or req.finished():
        return waits
    req.__dict__[_MARK] = Past(ids)
    return True if waits else not take_up(manager.scheduler, req)


def grammar_ready(stock: Callable[..., Any], manager: Any) -> Any:
    """In place of `get_ready_grammar_requests`: without those that were refused."""
    return [
        req
        for req in stock(manager)
        if past(req) is None
        or req.to_finish is not None
        or req.finished()
        or take_up(manager.scheduler, req)
    ]


def _take(req: Any) -> list[int] | None:
    """The given tokens, out of the sampling parameters: these are as the client wrote them."""
    sampling = getattr(req, "sampling_params", None)
    custom = getattr(sampling, "custom_params", None)
    if not isinstance(custom, dict) or KEY not in custom:
        return None
    rest = {name: value for name, value in custom.items() if name != KEY}
    # Stock adds `__req__` for a custom logit processor where there is a dictionary.
    req.sampling_params.custom_params = rest if rest.keys() - {"__req__"} else None
    return [int(token) for token in custom[KEY]]


def take_up(scheduler: Any, req: Any) -> bool:
    """Whether it goes on from here; else its client has been told why not."""
    own = past(req)
    assert own is not None
    why = _replay(scheduler, req, own.ids)
    if why is not None:
        del req.__dict__[_MARK]
        req.output_ids = _like(req.output_ids, ())
        _refuse(scheduler, req, why)
        return False
    mode = _mode(scheduler)
    if mode != _ALONE:
        req.origin_input_ids = req.origin_input_ids + _like(req.origin_input_ids, own.ids)
        req.output_ids = _like(req.output_ids, ())
        own.in_prompt = True
    if req.return_logprob:
        _skip_logprobs(req, len(own.ids), mode)
    if mode == _DECODE and req.grammar is not None:
        # Stock takes a grammar with a current token for one that knows prefill's token.
        req.grammar.current_token = None
    _untold.add(req)
    counts.inc("requests")
    counts.inc("tokens", len(own.ids))
    return True


def _replay(scheduler: Any, req: Any, ids: list[int]) -> str | None:
    """Generate the tokens once more, without the model. Why that cannot be, or None."""
    if getattr(req, "dllm_config", None) is not None:
        return "a diffusion model has no next token; send the request from its start"
    if req.grammar is not None:
        for position, token in enumerate(ids):
            try:
                req.grammar.accept_token(token)
            except ValueError:
                return (
                    f"output_ids[{position}] {token} is not what the grammar allows there; send "
                    "the grammar and the ids of the same answer"
                )
    req.output_ids.extend(ids)
    finish = getattr(req, "update_finish_state", None) or req.check_finished
    finish(len(ids))
    if req.finished():
        reason = req.finished_reason.to_json()
        req.finished_reason = req.finished_len = None
        return _ended(reason, len(ids))
    sampling = req.sampling_params
    if sampling.stop_strs:
        text = req.tokenizer.decode(ids)
        for stop in sampling.stop_strs:
            if stop in text:  # releases up to 0.5.14 look at the last tokens only
                return _ended({"type": "stop", "matched": stop}, len(ids))
    processor = getattr(scheduler, "batch_result_processor", scheduler)
    processor._maybe_update_reasoning_tokens(req, ids)
    return None


def _ended(reason: dict[str, Any], tokens: int) -> str:
    if reason["type"] == "length":
        return (
            f"{tokens} tokens were given and the answer may have {reason['length']}: it has ended "
            "and nothing is left to generate; give fewer tokens or a larger limit"
        )
    return (
        f"the answer ended within the {tokens} given tokens, at {reason.get('matched')!r}; nothing "
        "is left to generate"
    )


def _refuse(scheduler: Any, req: Any, why: str) -> None:
    from sglang.srt.disaggregation.utils import prepare_abort

    counts.inc("refused")
    prepare_abort(req, str(wire.refused(why)), status_code=HTTPStatus.BAD_REQUEST)
    streamer = getattr(scheduler, "output_streamer", scheduler)
    streamer.stream_output([req], req.return_logprob)


def _mode(scheduler: Any) -> str:
    mode = scheduler.disaggregation_mode
    return str(getattr(mode, "value", mode))


def _like(tokens: Any, ids: Sequence[int]) -> Any:
    """`ids` in the type of `tokens`: a list, or an array since 0.5.13."""
    return array(tokens.typecode, ids) if isinstance(tokens, array) else list(ids)


_LOGPROBS = ("token_logprobs", "top_logprobs", "token_ids_logprobs")


def _skip_logprobs(req: Any, tokens: int, mode: str) -> None:
    """Those of the given tokens came with the first part: none is computed, none is sent."""
    if req.logprob_start_len >= 0:
        req.logprob_start_len += tokens  # from the end of the prompt on
    if mode == "prefill":
        return
    # Stock finds a token's own by its place in the output.
    kept = getattr(req, "logprob", req)
    for kind in _LOGPROBS:
        for what in ("val", "idx"):
            setattr(kept, f"output_{kind}_{what}", [None] * tokens)
    req.send_output_token_logprobs_offset = tokens


# -- where it is sampled -------------------------------------------------------------------


def sampling(stock: Callable[..., Any], cls: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `SamplingBatchInfo.from_schedule_batch`: with the penalties of the past."""
    info = stock(cls, batch, *args, **kwargs)
    for row, req in enumerate(batch.reqs):
        own = past(req)
        if own is not None and info.penalizer_orchestrator.is_required:
            penalties.restore(info.penalizer_orchestrator, row, _counted(batch, req, own))
    return info


def _counted(batch: Any, req: Any, own: Past) -> penalties.Counted:
    overlap = bool(batch.enable_overlap) and batch.spec_algorithm.is_none()
    prompt = req.origin_input_ids
    if own.in_prompt:
        prompt, output = prompt[: -len(own.ids)], [*own.ids, *req.output_ids]
    else:
        output = [*req.output_ids]
    pair = own.in_prompt or batch.forward_mode.is_prebuilt()
    if not batch.forward_mode.is_prebuilt():
        return penalties.counted(output, prompt[-1], overlap=overlap, pair=pair)
    *before, last = output
    return penalties.counted(before, prompt[-1], overlap=overlap, pair=pair, waiting=last)


def arrived(stock: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `process_prebuilt`, on a decode server: the KV is here, the pair is done."""
    for req in batch.reqs:
        own = past(req)
        if own is not None and own.in_prompt:
            req.origin_input_ids = req.origin_input_ids[: -len(own.ids)]
            req.output_ids = _like(req.output_ids, own.ids) + req.output_ids
            own.in_prompt = False
    return stock(batch, *args, **kwargs)


# -- where it is sent ----------------------------------------------------------------------


def stream(
    stock: Callable[..., Any],
    streamer: Any,
    reqs: Sequence[Any],
    return_logprob: bool,
    skip_req: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of `stream_output`: the given tokens go first, in a message of their own."""
    if _untold:
        for req in [req for req in reqs if req in _untold and req is not skip_req]:
            own = past(req)
            assert own is not None
            if own.in_prompt or len(req.output_ids) <= len(own.ids):
                continue  # an end without a new token
            _untold.discard(req)
            # The cache may have known given tokens too; the prompt is what they are a part of.
            req.cached_tokens = min(req.cached_tokens, len(req.origin_input_ids))
            if req.stream:
                _tell(stock, streamer, req, own.ids)
    return stock(streamer, reqs, return_logprob, skip_req, *args, **kwargs)


def _tell(stock: Callable[..., Any], streamer: Any, req: Any, ids: list[int]) -> None:
    """Have stock send of `ids` what a stream would have shown: not the beginning of a stop."""
    kept = req.output_ids, req.finished_reason, req.finished_len
    interval, offset = req.sampling_params.stream_interval, req.send_output_token_logprobs_offset
    req.finished_reason = req.finished_len = None
    req.sampling_params.stream_interval = 1
    try:
        for shown in range(len(ids), 0, -1):
            req.output_ids = _like(req.output_ids, ids[:shown])
            if not req.check_match_stop_str_prefix():
                stock(streamer, [req], req.return_logprob)
                break
    finally:
        req.output_ids, req.finished_reason, req.finished_len = kept
        req.sampling_params.stream_interval = interval
        req.send_output_token_logprobs_offset = offset
