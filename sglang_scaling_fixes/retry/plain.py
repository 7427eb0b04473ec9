"""Going on with a stream on workers without the fix `resume`, as far as stock's API allows. No I/O.

    /generate from input_ids    its events say their tokens; the next worker's prompt has them, too
    /v1/chat/completions        plain text: the next worker continues the assistant's message

Neither knows what the first worker knew: penalties, stop strings, grammars and log-probabilities
look back at the whole answer. So a request may only have the fields named here. What the next
worker's events say of the whole answer (text, tokens, counts) is said again with what was there.
"""

from __future__ import annotations

import abc
from typing import Any

import orjson

from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.sse import data_of

_GENERATE = frozenset({"input_ids", "sampling_params", "stream", "rid", "priority", "lora_path"})
_SAMPLING = frozenset(
    {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "ignore_eos", "stop_token_ids"}
    | {"skip_special_tokens", "spaces_between_special_tokens", "n"}
)
_CHAT = frozenset(
    {"model", "messages", "stream", "temperature", "top_p", "top_k", "min_p", "user", "rid", "n"}
)
_LIMIT = 128
"""Stock's `max_new_tokens` where a request of /generate says none."""


class Unfit(ValueError):
    """Why a request or its answer cannot be gone on with; the words go into the client's error."""


class Plain(abc.ABC):
    """What is known of one answer, over all of its attempts."""

    exact = True
    """Whether it is known which token an event ends with."""

    @abc.abstractmethod
    def fields(self, ids: list[int], last: bytes) -> dict[str, Any]:
        """What the next attempt's body says instead. `ids`, `last`: the tokens that stay, and
        the last event that stays, b"" if there is none."""

    @abc.abstractmethod
    def spent(self, count: int) -> bool:
        """Whether an answer of so many tokens leaves nothing to ask for."""

    @abc.abstractmethod
    def read(self, event: bytes, begun: int) -> tuple[bytes, list[int] | None]:
        """The event as the client is to get it, and all tokens of the answer behind it.

        None: no next worker could go on behind this event. b"": the client has it already.
        `begun`: with how many tokens this attempt began. Raises `Unfit`.
        """


def plain(request: ClientRequest) -> Plain:
    """How to go on with the answer to this request. Raises `Unfit`."""
    said = orjson.loads(request.body)
    if request.path == "/generate":
        return _Generate(said)
    if request.path == "/v1/chat/completions":
        return _Chat(said)
    raise Unfit(f"of {request.path} nobody can without it")


def _refuse_others(said: dict[str, Any], known: frozenset[str], where: str = "") -> None:
    for name, value in said.items():
        if name not in known and value is not None:
            raise Unfit(f"nobody can take up {where}{name} without it")


class _Generate(Plain):
    def __init__(self, said: dict[str, Any]) -> None:
        sampling = said.get("sampling_params") or {}
        if not isinstance(said.get("input_ids"), list) or not isinstance(sampling, dict):
            raise Unfit("only a prompt of input_ids can be continued without it")
        _refuse_others(said, _GENERATE)
        _refuse_others(sampling, _SAMPLING, "sampling_params.")
        self._prompt: list[int] = said["input_ids"]
        self._sampling: dict[str, Any] = sampling
        self._most: int = sampling.get("max_new_tokens") or _LIMIT
        self._text = ""  # of the answer when this attempt began
        self._ids: list[int] = []
        self._seen = ""  # of the answer so far

    def fields(self, ids: list[int], last: bytes) -> dict[str, Any]:
        self._ids = list(ids)
        self._text = orjson.loads(data_of(last)).get("text", "") if last else ""
        self._seen = self._text
        return {
            "input_ids": [*self._prompt, *ids],
            "sampling_params": {**self._sampling, "max_new_tokens": self._most - len(ids)},
        }

    def spent(self, count: int) -> bool:
        return count >= self._most

    def read(self, event: bytes, begun: int) -> tuple[bytes, list[int] | None]:
        data = data_of(event)
        said = orjson.loads(data) if data.startswith(b"{") else None
        if said is None or "meta_info" not in said:
            return event, None
        own, meta = said.get("output_ids"), said["meta_info"]
        if not isinstance(own, list) or len(own) != meta.get("completion_tokens"):
            raise Unfit("its worker does not say all tokens of its answer")
        ids = [*self._ids, *own]
        if begun:
            said["output_ids"] = ids
            meta["completion_tokens"] = len(ids)
            meta["prompt_tokens"] = len(self._prompt)
            if "text" in said:
                said["text"] = self._text + said["text"]
            event = event.replace(data, orjson.dumps(said), 1)
        # A character of several tokens is said with the last of them; before, a worker that went
        # on would not say it.
        text = said.get("text")
        whole = text is None or text != self._seen
        self._seen = text or ""
        return event, ids if whole else None


class _Chat(Plain):
    exact = False

    def __init__(self, said: dict[str, Any]) -> None:
        messages = said.get("messages")
        if said.get("max_tokens") or said.get("max_completion_tokens"):
            raise Unfit("how many tokens are left of its limit is not known without it")
        _refuse_others(said, _CHAT)
        if not isinstance(messages, list) or not messages or messages[-1].get("role") != "user":
            raise Unfit("only an answer to a user's message can be continued without it")
        self._messages: list[Any] = messages
        self._text = ""
        self._events = 0

    def fields(self, ids: list[int], last: bytes) -> dict[str, Any]:
        partial = {"role": "assistant", "content": self._text}
        return {"messages": [*self._messages, partial], "continue_final_message": True}

    def spent(self, count: int) -> bool:
        return False

    def read(self, event: bytes, begun: int) -> tuple[bytes, list[int] | None]:
        data = data_of(event)
        said = orjson.loads(data) if data.startswith(b"{") else {}
        for choice in said.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("tool_calls") or delta.get("reasoning_content"):
                raise Unfit("only plain text can be continued without it")
            text = delta.get("content") or ""
            if begun and not text and delta.get("role") and not choice.get("finish_reason"):
                return b"", None  # the beginning of an answer, which the client has
            if text:
                self._text += text
                self._events += 1
                return event, [0] * self._events
        return event, None
