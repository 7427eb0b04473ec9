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

import msgspec
import orjson

from sglang_scaling_fixes.retry.request import ClientRequest
from sglang_scaling_fixes.retry.sse import data_of

MOST_BYTES = 1 << 21
"""Of a body that is looked into here: a prompt of some 300,000 tokens."""
_GENERATE = frozenset({"input_ids", "sampling_params", "stream", "rid", "priority", "lora_path"})
_SAMPLING = frozenset(
    {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "ignore_eos", "stop_token_ids"}
    | {"skip_special_tokens", "spaces_between_special_tokens", "n"}
)
_CHAT = frozenset(
    {"model", "messages", "stream", "temperature", "top_p", "top_k", "min_p", "user", "rid", "n"}
)
_CJK = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))
UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, IndexError)
"""What odd JSON raises here, `Unfit` among them."""

Raw = msgspec.Raw
_fields = msgspec.json.Decoder(dict[str, Raw])
_list = msgspec.json.Decoder(list[Raw])


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

        None: no next worker could go on behind this event. b"": nothing of it is for the client.
        `begun`: with how many tokens this attempt began. Raises one of `UNREADABLE`.
        """


def plain(request: ClientRequest) -> Plain:
    """How to go on with the answer to this request. Raises one of `UNREADABLE`."""
    if len(request.body) > MOST_BYTES:
        raise Unfit("a request of this size is not looked into")
    if request.path == "/generate":
        return _Generate(_fields.decode(request.body))
    if request.path == "/v1/chat/completions":
        return _Chat(_fields.decode(request.body))
    raise Unfit(f"of {request.path} nobody can without it")


def _refuse_others(said: dict[str, Any], known: frozenset[str], where: str = "") -> None:
    for name, value in said.items():
        if name not in known and value is not None and bytes(value) != b"null":
            raise Unfit(f"nobody can take up {where}{name} without it")


def _one_answer(said: dict[str, Raw]) -> None:
    if bytes(said.get("n", b"null")) not in (b"null", b"1"):
        raise Unfit("it has several answers")


class _Generate(Plain):
    def __init__(self, said: dict[str, Raw]) -> None:
        prompt = bytes(said.get("input_ids", b"")).strip()
        if not prompt.startswith(b"[") or prompt[1:].lstrip()[:1] in (b"[", b"]"):
            raise Unfit("only a prompt of input_ids can be continued without it")
        _refuse_others(said, _GENERATE)
        sampling = _fields.decode(said.get("sampling_params", Raw(b"{}")))
        _refuse_others(sampling, _SAMPLING, "sampling_params.")
        _one_answer(sampling)
        if "max_new_tokens" not in sampling:
            raise Unfit("how many tokens are left of the server's own limit is not known")
        most = orjson.loads(bytes(sampling["max_new_tokens"]))
        if most is not None and type(most) is not int:
            raise Unfit("its max_new_tokens is no number")
        self._prompt = prompt
        self._prompt_tokens = prompt.count(b",") + 1
        self._sampling = sampling
        self._most: int | None = most
        self._begin()

    def _begin(self, text: str = "", ids: list[int] | None = None) -> None:
        """An attempt begins with this much of the answer."""
        self._text, self._ids = text, list(ids or ())
        self._seen, self._count, self._events = text, 0, 0

    def fields(self, ids: list[int], last: bytes) -> dict[str, Any]:
        self._begin(orjson.loads(data_of(last)).get("text", "") if last else "", ids)
        added = b"," + orjson.dumps(ids)[1:]
        left = self._most if self._most is None else self._most - len(ids)
        return {
            "input_ids": Raw(self._prompt[:-1] + added),
            "sampling_params": {**self._sampling, "max_new_tokens": left},
        }

    def spent(self, count: int) -> bool:
        return self._most is not None and count >= self._most

    def read(self, event: bytes, begun: int) -> tuple[bytes, list[int] | None]:
        data = data_of(event)
        said = orjson.loads(data) if data.startswith(b"{") else None
        if said is None or "meta_info" not in said:
            return event, None
        own, meta = said.get("output_ids"), said["meta_info"]
        if not isinstance(own, list) or len(own) != meta["completion_tokens"]:
            raise Unfit("its worker does not say all tokens of its answer")
        more, self._count = len(own) - self._count, len(own)
        self._events += 1
        finish = meta.get("finish_reason")
        ids = [*self._ids, *own]
        if begun:
            said["output_ids"] = ids
            meta["completion_tokens"] = len(ids)
            meta["prompt_tokens"] = self._prompt_tokens
            if finish and isinstance(finish.get("length"), int):
                finish["length"] += len(self._ids)
            if "text" in said:
                said["text"] = self._text + said["text"]
            event = event.replace(data, orjson.dumps(said), 1)
        text = said.get("text")
        whole = text is None or (text != self._seen and not _may_lack(text, more))
        self._seen = text or ""
        # A first event alone does not show that the second will say its tokens again.
        return event, ids if whole and not finish and self._events > 1 else None


def _may_lack(text: str, tokens: int) -> bool:
    """Whether the last of so many tokens may hold a part of a character that was not said yet.

    Of a broken last character stock says what stands before it, up to a space, or up to a
    character of Chinese, Japanese or Korean.
    """
    last = ord(text[-1])
    return text[-1] == " " or (tokens > 1 and any(a <= last <= b for a, b in _CJK))


class _Chat(Plain):
    exact = False

    def __init__(self, said: dict[str, Raw]) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            if bytes(said.get(name, b"null")) != b"null":
                raise Unfit("how many tokens are left of its limit is not known without it")
        _refuse_others(said, _CHAT)
        _one_answer(said)
        messages = _list.decode(said["messages"])
        last = _fields.decode(messages[-1]) if messages else {}
        if bytes(last.get("role", b"")) != b'"user"':
            raise Unfit("only an answer to a user's message can be continued without it")
        self._messages = bytes(said["messages"]).strip()
        self._text = ""
        self._events = 0

    def fields(self, ids: list[int], last: bytes) -> dict[str, Any]:
        partial = orjson.dumps({"role": "assistant", "content": self._text})
        return {
            "messages": Raw(self._messages[:-1] + b"," + partial + b"]"),
            "continue_final_message": True,
        }

    def spent(self, count: int) -> bool:
        return False

    def read(self, event: bytes, begun: int) -> tuple[bytes, list[int] | None]:
        data = data_of(event)
        said = orjson.loads(data) if data.startswith(b"{") else {}
        choices = said.get("choices") or []
        if begun and said.get("usage"):
            if choices:
                raise Unfit("its usage is that of a part of the answer")
            return b"", None  # nobody asked for it
        for choice in choices:
            delta = choice.get("delta") or {}
            if delta.get("tool_calls") or delta.get("reasoning_content") or choice.get("index"):
                raise Unfit("only plain text can be continued without it")
            text = delta.get("content") or ""
            if begun and not text and delta.get("role") and not choice.get("finish_reason"):
                return b"", None  # the beginning of an answer, which the client has
            if text and not choice.get("finish_reason"):
                self._text += text
                self._events += 1
                return event, [0] * self._events
        return event, None
