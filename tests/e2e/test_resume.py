"""An answer that is cut anywhere and resumed elsewhere is the answer that was never cut."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment, lab_home
from sglang_scaling_fixes.lab.servers import checkpoints, tokenizer
from sglang_scaling_fixes.lab.servers.client import Answer
from sglang_scaling_fixes.lab.servers.link import LOCAL
from sglang_scaling_fixes.lab.servers.server import Server
from sglang_scaling_fixes.resume.wire import FIELD

from .servers import prompt

pytestmark = pytest.mark.e2e

TOKENS = 40
CUTS = (1, 7, 20, 39)
SAYS = f": {FIELD}_ids "
PROMPT = prompt(60)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 6, "maxLength": 12},
        "count": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "store", "parameters": SCHEMA}}
FLAGS = ("--tool-call-parser", "qwen25")
FEW = {str(token): 12.0 for token in range(300, 324)}
"""Tokens that the answer is made of, so that it repeats some and a penalty for that matters."""


def of_bytes(model: checkpoints.Model) -> checkpoints.Model:
    """The model, with a tokenizer in which any text can be written."""
    folder = lab_home() / "models" / "bytes"
    return replace(model, tokenizer=tokenizer.write_bytes(folder, checkpoints.VOCAB))


@dataclass
class Event:
    """An event of a stream, and how many tokens the answer had with it (0: it was not said)."""

    data: dict[str, Any]
    tokens: int = 0

    def told(self) -> dict[str, Any]:
        """What a client makes use of: names and times are another request's."""
        found = dict(self.data)
        for key in ("id", "created", "sequence_number", "item_id", "response", "item", "message"):
            found.pop(key, None)
        return dict(json.loads(re.sub(r"call_\w+", "call", json.dumps(found))))


GROWING = {"content", "reasoning_content", "text", "delta", "arguments", "partial_json"}


def folded(events: Iterable[Event]) -> tuple[list[Any], dict[str, str]]:
    """The shapes of the events, each once for those in a row, and what each field said in all.

    Stock says several tokens in one event when it is busy, the last one not excepted.
    """
    shapes: list[Any] = []
    said: dict[str, str] = {}
    for event in events:
        shape = _shape(event.told(), "", said)
        if shapes[-1:] != [shape]:
            shapes.append(shape)
    return shapes, said


def _shape(value: Any, path: str, said: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_shape(each, f"{path}[{i}]", said) for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    shape = {}
    for key, each in value.items():
        at = f"{path}.{key}"
        if key in GROWING and isinstance(each, str):
            said[at] = said.get(at, "") + each
            shape[key] = "..."
        else:
            shape[key] = _shape(each, at, said)
    return shape


@dataclass
class Worker:
    """A server, and the name that the OpenAI API calls its model by."""

    server: Server
    model: str

    def post(self, path: str, body: dict[str, Any]) -> Answer:
        return self.server.post(path, body)

    def generate(self, given: list[int] | None = None, **options: Any) -> dict[str, Any]:
        answer = self.post("/generate", body(given, **options))
        assert answer.status == 200, answer.body
        return dict(answer.body)

    def stream(self, path: str, request: dict[str, Any], given: Sequence[int] = ()) -> Stream:
        """What comes after the given tokens."""
        field = {FIELD: {"output_ids": list(given), "report_ids": True}}
        answer = self.post(path, {**request, "stream": True, **field})
        assert answer.status == 200, answer.body
        return read(answer.body, given)

    def counted(self) -> dict[str, int]:
        state = self.server.get("/server_info").body["internal_states"][0]
        return dict(state["sglang_scaling_fixes"]["resume"])


@dataclass
class Stream:
    events: list[Event]
    ids: list[int]
    """All tokens of the answer, also those that were given."""

    def after(self, cut: int) -> list[Event]:
        """The events of the tokens behind the first `cut`."""
        return [event for event in self.events if not 0 < event.tokens <= cut]

    def cuts(self, most: int) -> list[int]:
        """Some places between two events, where a client may have stopped hearing."""
        found = sorted({event.tokens for event in self.events} - {0, len(self.ids)})
        return found[:: max(len(found) // most, 1)]


def read(text: str, given: Sequence[int]) -> Stream:
    events: list[Event] = []
    ids = list(given)
    for line in text.splitlines():
        if line.startswith(SAYS):
            ids += json.loads(line[len(SAYS) :])
            for event in events:
                event.tokens = event.tokens or len(ids)
        elif line.startswith("data: ") and line != "data: [DONE]":
            events.append(Event(json.loads(line[6:])))
    assert all("error" not in event.data for event in events)
    return Stream(events, ids)


def body(given: list[int] | None = None, **options: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    top: dict[str, Any] = {
        key: options.pop(key) for key in ("stream", "return_logprob") if key in options
    }
    resumed = {} if given is None else {FIELD: {"output_ids": given}}
    return {"input_ids": PROMPT, "sampling_params": {**sampling, **options}, **top, **resumed}


@contextlib.contextmanager
def alone(
    environment: Environment,
    name: str,
    run_dirs: pytest.TempPathFactory,
    *flags: str,
    model: Callable[[Environment], checkpoints.Model] = checkpoints.llama,
) -> Iterator[Server]:
    """A server of its own for the model in whose tokenizer any text can be written."""
    server = Server(
        environment,
        of_bytes(model(environment)),
        name,
        "alone",
        place=LOCAL,
        client=LOCAL,
        run_dir=run_dirs.mktemp(name),
        flags=("--max-total-tokens", "4096", "--plugin", *flags),
    )
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


def named(server: Server) -> Worker:
    """With the name that it gives its model."""
    return Worker(server, server.get("/v1/models").body["data"][0]["id"])


@pytest.fixture(scope="module")
def worker(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with alone(new, "resume", tmp_path_factory, "--sleep-on-idle", *FLAGS) as server:
        yield named(server)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frequency": {"frequency_penalty": 1.5, "logit_bias": FEW},
    "presence": {"presence_penalty": 1.5, "logit_bias": FEW},
    "repetition": {"repetition_penalty": 1.7, "logit_bias": FEW},
    "all penalties": {
        "logit_bias": FEW,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.3,
        "min_new_tokens": 30,
    },
    "schema": {"json_schema": json.dumps(SCHEMA)},
    "characters": {"regex": "([à-ÿ][一-龥]){6,9}"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_goes_on_as_if_never_cut(worker: Worker, kind: str) -> None:
    options = KINDS[kind]
    whole = worker.generate(**options)
    ids = whole["output_ids"]
    cuts = [cut for cut in CUTS if cut < len(ids)]
    assert cuts
    for cut in cuts:
        before = worker.counted()
        resumed = worker.generate(ids[:cut], **options)
        assert resumed["output_ids"] == ids, cut
        # It was not generated from the start, which would be the same.
        after = worker.counted()
        assert [after[name] - before[name] for name in ("requests", "tokens")] == [1, cut]
        assert resumed["text"] == whole["text"]
        for count in ("prompt_tokens", "completion_tokens", "finish_reason"):
            assert resumed["meta_info"][count] == whole["meta_info"][count]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_without_the_field_it_goes_elsewhere(worker: Worker, kind: str) -> None:
    """The control: the same tokens as a longer prompt."""
    options = KINDS[kind]
    ids = worker.generate(**options)["output_ids"]
    differ = 0
    for cut in [cut for cut in CUTS if cut < len(ids)]:
        request = body(**options)
        request["input_ids"] = PROMPT + ids[:cut]
        sampling = request["sampling_params"]
        sampling["max_new_tokens"] -= cut
        sampling["min_new_tokens"] = max(sampling.get("min_new_tokens", 0) - cut, 0)
        answer = worker.post("/generate", request)
        differ += ids[:cut] + answer.body["output_ids"] != ids
    assert differ


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_generate_goes_on_with_what_is_new(worker: Worker, kind: str) -> None:
    """Its events hold the whole answer so far; at no length do they say something else."""
    request = body(**KINDS[kind])
    whole = worker.stream("/generate", request)
    said = {tokens: answer for tokens, *answer in map(so_far, whole.events)}
    assert len(said) > len(whole.ids) // 2
    for cut in [cut for cut in CUTS if cut < len(whole.ids)]:
        resumed = worker.stream("/generate", request, whole.ids[:cut])
        assert resumed.ids == whole.ids
        lengths = [so_far(event)[0] for event in resumed.events]
        assert lengths == sorted(set(lengths)) and lengths[0] > cut
        assert lengths[-1] == len(whole.ids)
        for tokens, *answer in map(so_far, resumed.events):
            assert answer == said.get(tokens, answer)


def so_far(event: Event) -> tuple[int, str, list[int], int, Any]:
    data, meta = event.data, event.data["meta_info"]
    tokens = meta["completion_tokens"]
    ids = data["output_ids"][:tokens]
    return tokens, data["text"], ids, meta["prompt_tokens"], meta["finish_reason"]


MESSAGES = {
    "messages": [{"role": "user", "content": "What is the answer? Say it."}],
    "max_tokens": TOKENS,
}
CHAT = {**MESSAGES, "ignore_eos": True, "stream_options": {"include_usage": True}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": (
        "/v1/completions",
        {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "logit_bias": FEW},
    ),
    "chat": ("/v1/chat/completions", {**CHAT, "frequency_penalty": 1.0, "logit_bias": FEW}),
    "chat in JSON": (
        "/v1/chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": SCHEMA},
            },
        },
    ),
    "chat in characters": ("/v1/chat/completions", {**CHAT, "regex": "([à-ÿ][一-龥]){6,9}"}),
    "tool call": (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 120, "tools": [TOOL], "tool_choice": "required"},
    ),
    "responses": (
        "/v1/responses",
        {"input": "What is it?", "max_output_tokens": TOKENS, "ignore_eos": True},
    ),
    "messages": ("/v1/messages", MESSAGES),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_stream_of_each_api_goes_on_in_mid_sentence(worker: Worker, kind: str) -> None:
    """Roles, openings and what was given are not sent again; parsers go on where they were."""
    path, request = REQUESTS[kind]
    request = {**request, "model": worker.model, "temperature": 0}
    whole = worker.stream(path, request)
    assert len(whole.ids) > 20
    cuts = whole.cuts(6)
    assert cuts
    for cut in cuts:
        resumed = worker.stream(path, request, whole.ids[:cut])
        assert resumed.ids == whole.ids, cut
        assert folded(resumed.events) == folded(whole.after(cut)), cut


@pytest.mark.parametrize("kind", [kind for kind in REQUESTS if kind != "responses"])
def test_a_whole_answer_of_each_api_is_whole(worker: Worker, kind: str) -> None:
    path, request = REQUESTS[kind]
    request = {**request, "model": worker.model, "temperature": 0}
    ids = worker.stream(path, request).ids
    request.pop("stream_options", None)

    def told(answer: Answer) -> dict[str, Any]:
        assert answer.status == 200, answer.body
        return Event(answer.body).told()

    whole = told(worker.post(path, request))
    for cut in (1, len(ids) // 2):
        before = worker.counted()["tokens"]
        resumed = worker.post(path, {**request, FIELD: {"output_ids": ids[:cut]}})
        assert told(resumed) == whole
        assert worker.counted()["tokens"] - before == cut


def test_a_stop_string_across_the_seam_is_found(worker: Worker) -> None:
    ids = worker.generate(logit_bias=FEW, frequency_penalty=2.0)["output_ids"]
    words = [f"w{token}" for token in ids]
    at = next(at for at in range(10, 30) if words.index(words[at]) == at)
    stop = "".join(words[at : at + 3])
    options: dict[str, Any] = {"logit_bias": FEW, "frequency_penalty": 2.0, "stop": [stop]}
    whole = worker.generate(**options)
    assert whole["meta_info"]["finish_reason"]["matched"] == options["stop"][0]
    request = body(**options)
    last = worker.stream("/generate", request).events[-1]
    for cut in (at, at + 1, at + 2):
        resumed = worker.generate(ids[:cut], **options)
        assert (resumed["text"], resumed["output_ids"]) == (whole["text"], whole["output_ids"])
        events = worker.stream("/generate", request, ids[:cut]).events
        # What stock holds back of a stop string is sent when it is known to be none.
        assert so_far(events[-1]) == so_far(last)
        assert all(words[at] not in event.data["text"] for event in events)


def test_log_probabilities_are_those_of_the_new_tokens(worker: Worker) -> None:
    whole = worker.generate(return_logprob=True)
    values = whole["meta_info"]["output_token_logprobs"]
    for cut in CUTS:
        resumed = worker.generate(whole["output_ids"][:cut], return_logprob=True)
        assert resumed["output_ids"] == whole["output_ids"]
        found = resumed["meta_info"]["output_token_logprobs"]
        assert [entry[1] for entry in found] == [entry[1] for entry in values[cut:]]
        assert [entry[0] for entry in found] == pytest.approx(
            [entry[0] for entry in values[cut:]], abs=1e-4
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([1] * TOKENS, {}, "40 tokens were given and the answer may have 40"),
        (
            [5, 6],
            {"stop_token_ids": [6], "ignore_eos": False},
            "the answer ended within the 2 given tokens",
        ),
        ([300, 301], {"stop": ["w300w3"]}, "at 'w300w3'"),
        ([5, 6], {"json_schema": json.dumps(SCHEMA)}, "output_ids[0] 5 is not what the grammar"),
        ([5, checkpoints.VOCAB], {}, f"is not in this model's vocabulary of {checkpoints.VOCAB}"),
        ([-1], {}, "output_ids[0] -1 is not a token id"),
        ([5], {"n": 2}, "n 2 with one answer to resume"),
    ],
)
def test_what_cannot_be_resumed_is_a_400(
    worker: Worker, given: list[int], options: dict[str, Any], said: str, stream: bool
) -> None:
    answer = worker.post("/generate", body(given, stream=stream, **options))
    assert answer.status == 400
    assert answer.body["error"]["param"] == FIELD
    assert said in answer.body["error"]["message"]
    assert worker.generate()["output_ids"]  # and it goes on
