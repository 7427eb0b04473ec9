"""Resume in the main process: from a request's body to stock's tokenized request, and back.

The tokens travel in `custom_params` of the sampling parameters, which stock hands to the scheduler
as it is and a prefill/decode pair has on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from sglang_scaling_fixes.resume import texts, wire
from sglang_scaling_fixes.resume.middleware import CURRENT, Answer

KEY = wire.FIELD
"""Of the tokens in `custom_params`."""
_PARSED = wire.PATHS - {"/generate", "/v1/completions"}
"""Paths whose text goes through parsers of tool calls and reasoning."""
_PAUSE = 32
"""Steps of a text after which other requests have a turn."""

_awaited: dict[str, Answer] = {}
"""Streams whose given tokens the scheduler has still to send, by request id."""


def generate(
    stock: Callable[..., Any], manager: Any, obj: Any, request: Any = None, *args: Any, **kw: Any
) -> Any:
    """In place of stock's `generate_request`: an async generator of outputs."""
    answer = CURRENT.get()
    if answer is None or answer.claimed:
        return stock(manager, obj, request, *args, **kw)
    answer.claimed = True
    answer.obj = obj
    answer.silent &= bool(getattr(obj, "stream", False))
    return _resumed(stock(manager, obj, request, *args, **kw), manager, answer)


async def _resumed(outputs: Any, manager: Any, answer: Answer) -> AsyncIterator[Any]:
    told = 0
    try:
        check(answer.obj)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                reason = output.get("meta_info", {}).get("finish_reason")
                if isinstance(reason, dict) and wire.is_ours(reason.get("message")):
                    raise wire.BadResumeError(reason["message"])
                shown, answer.shown = answer.shown, None
                if answer.silent and shown is not None:
                    async for step in _steps(manager, answer, shown):
                        yield step
                    told = shown["meta_info"]["completion_tokens"]
                answer.silent = False
                ids, told = _ids(manager, output, told)
                yield output
                new = ids[max(len(answer.ids) - told + len(ids), 0) :]
                if answer.ask.report_ids and answer.obj.stream:
                    await answer.report(new)  # all events of theirs have been sent
    except Exception as error:
        answer.silent = False
        if wire.is_ours(str(error)):
            answer.error = str(error)
        raise
    finally:
        _awaited.pop(getattr(answer.obj, "rid", None), None)  # type: ignore[arg-type]


def _ids(manager: Any, output: Any, told: int) -> tuple[list[int], int]:
    """The tokens of `output` behind the first `told` of the answer, and how many are told then.

    Ask before others have a turn: stock adds to the same list.
    """
    ids = output.get("output_ids") or ()
    if not incremental(manager):
        ids = ids[told : output["meta_info"].get("completion_tokens", len(ids))]
    return list(ids), told + len(ids)


async def _steps(manager: Any, answer: Answer, shown: dict[str, Any]) -> AsyncIterator[Any]:
    """`shown` as one output, or as one for each token where parsers read the text."""
    tokenizer = getattr(manager, "tokenizer", None)
    if answer.path not in _PARSED or tokenizer is None or not shown.get("text"):
        yield shown
        return
    special = getattr(answer.obj, "sampling_params", {}).get("skip_special_tokens", True)

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=special))

    ids = answer.ids[: shown["meta_info"]["completion_tokens"]]
    delta = incremental(manager)
    before, text_before = 0, ""
    steps = texts.growing(ids, decode, shown["text"])
    if answer.ask.steps:
        steps = texts.at(steps, [count for count in answer.ask.steps if count <= len(ids)])
    for number, (count, text) in enumerate(steps):
        meta = {**shown["meta_info"], "completion_tokens": count}
        if delta:
            yield {
                **shown,
                "text": text[len(text_before) :],
                "output_ids": ids[before:count],
                "meta_info": meta,
            }
        else:
            yield {**shown, "text": text, "output_ids": ids[:count], "meta_info": meta}
        before, text_before = count, text
        if number % _PAUSE == _PAUSE - 1:
            await asyncio.sleep(0)


def incremental(manager: Any) -> bool:
    """Whether stock's outputs of a stream hold what is new, and not all of it."""
    own = getattr(manager, "incremental_streaming_output", None)
    if own is None:
        own = getattr(manager.server_args, "incremental_streaming_output", False)
    return bool(own)


def check(obj: Any) -> None:
    """Raise BadResumeError for a request of which something would be lost."""
    if not hasattr(obj, "sampling_params") or not hasattr(obj, "stream"):
        raise wire.refused("this request generates nothing; leave the field out")
    sampling = obj.sampling_params
    if isinstance(sampling, list) or (sampling or {}).get("n", 1) not in (None, 1):
        raise wire.refused("more than one answer; resume one answer to one prompt in a request")
    for field in ("text", "input_ids"):
        value = getattr(obj, field, None)
        if isinstance(value, list) and value and not isinstance(value[0], int):
            raise wire.refused(f"{field} is a batch; resume one answer to one prompt in a request")
    for field, why in (
        ("image_data", "the positions of images are not restored"),
        ("video_data", "the positions of videos are not restored"),
        ("audio_data", "the positions of audio are not restored"),
        ("input_embeds", "output tokens have no embeddings there"),
        ("session_params", "a session keeps its own record of the answer"),
        ("return_hidden_states", "those of the given tokens are gone"),
        ("return_routed_experts", "those of the given tokens are gone"),
        ("return_indexer_topk", "those of the given tokens are gone"),
        ("return_sampling_mask", "those of the given tokens are gone"),
    ):
        if getattr(obj, field, None):
            raise wire.refused(f"{field}: {why}; send the request without it, or from its start")
    start = getattr(obj, "logprob_start_len", None)
    if getattr(obj, "return_logprob", False) and start not in (None, -1):
        raise wire.refused(
            f"logprob_start_len {start}: the prompt's log-probabilities came with the first part; "
            "leave it out"
        )


async def tokenized(stock: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """Stock's request for the scheduler, with the tokens that were given."""
    made = await stock(manager, obj)
    answer = CURRENT.get()
    if answer is None or answer.obj is not obj:
        return made
    if getattr(made, "mm_inputs", None) is not None:
        raise wire.refused("images, videos or audio: their positions are not restored")
    size = int(manager.model_config.vocab_size)
    for position, token in enumerate(answer.ids):
        if token >= size:
            raise wire.refused(
                f"output_ids[{position}] {token} is not in this model's vocabulary of {size}; send "
                "the ids that this model generated"
            )
    if not answer.ids:
        return made
    sampling = made.sampling_params
    sampling.custom_params = {**(sampling.custom_params or {}), KEY: answer.ids}
    if obj.stream:
        _awaited[made.rid] = answer
    return made


async def output(stock: Callable[..., Any], manager: Any, received: Any) -> Any:
    """Stock's handling of what a scheduler sent. Given tokens come first, in a message alone."""
    answer = None
    if _awaited:
        named = [rid for rid in received.rids if rid in _awaited]
        answer = _awaited.pop(named[0]) if named and _gives(received) else None
        for rid in named:
            _awaited.pop(rid, None)
    state = None if answer is None else manager.rid_to_state.get(received.rids[0])
    if answer is None or state is None:
        return await stock(manager, received)
    # Stock's waiter must not wake for it: it yields the last of the outputs it finds.
    waited, state.event = state.event, asyncio.Event()
    try:
        result = await stock(manager, received)
    finally:
        state.event = waited
    if state.out_list:
        shown = dict(state.out_list.pop())
        if "text" in shown and shown["text"] is None:  # stock asks for it when it yields
            shown["text"] = state.get_text()
        answer.shown = {**shown, "output_ids": list(shown.get("output_ids", ()))}
    return result


def _gives(received: Any) -> bool:
    """Whether this message holds nothing but the given tokens of one stream."""
    if len(received.rids) != 1 or received.finished_reasons[0] is not None:
        return False
    answer = _awaited[received.rids[0]]
    return bool(received.completion_tokens[0] <= len(answer.ids))
