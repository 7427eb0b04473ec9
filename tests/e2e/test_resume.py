"""An answer that is cut anywhere and resumed elsewhere is the answer that was never cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
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


def of_bytes(model: checkpoints.Model) -> checkpoints.Model:
    """The model, with a tokenizer in which any text can be written."""
    folder = lab_home() / "models" / "bytes"
    return replace(model, tokenizer=tokenizer.write_bytes(folder, checkpoints.VOCAB))


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

    def stream(self, path: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The JSON of a stream's events; its end is checked."""
        answer = self.post(path, {**request, "stream": True})
        assert answer.status == 200, answer.body
        lines = [line[6:] for line in answer.body.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def counted(self) -> dict[str, int]:
        state = self.server.get("/server_info").body["internal_states"][0]
        return dict(state["sglang_scaling_fixes"]["resume"])


def body(given: list[int] | None = None, **options: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    top = {key: options.pop(key) for key in ("stream", "return_logprob") if key in options}
    resumed = {} if given is None else {FIELD: {"output_ids": given}}
    return {"input_ids": PROMPT, "sampling_params": {**sampling, **options}, **top, **resumed}


@pytest.fixture(scope="module")
def worker(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    server = Server(
        new,
        of_bytes(checkpoints.llama(new)),
        "resume",
        "alone",
        place=LOCAL,
        client=LOCAL,
        run_dir=tmp_path_factory.mktemp("resume"),
        flags=("--max-total-tokens", "4096", "--sleep-on-idle", "--plugin", *FLAGS),
    )
    try:
        server.wait_ready()
        yield Worker(server, server.get("/v1/models").body["data"][0]["id"])
    finally:
        server.end()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.7},
    "all penalties": {
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
        resumed = worker.generate(ids[:cut], **options)
        assert resumed["output_ids"] == ids, cut
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
        answer = worker.post("/generate", request)
        differ += ids[:cut] + answer.body["output_ids"] != ids
    assert differ


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_generate_goes_on_with_what_is_new(worker: Worker, kind: str) -> None:
    options = KINDS[kind]
    whole = worker.stream("/generate", body(**options))
    ids = whole[-1]["output_ids"]

    def told(event: dict[str, Any]) -> tuple[Any, ...]:
        meta = event["meta_info"]
        return event["text"], event["output_ids"], meta["completion_tokens"], meta["finish_reason"]

    for cut in [cut for cut in CUTS if cut < len(ids)]:
        events = worker.stream("/generate", body(ids[:cut], **options))
        assert [told(event) for event in events] == [
            told(event) for event in whole if event["meta_info"]["completion_tokens"] > cut
        ]
