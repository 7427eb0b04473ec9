"""Corruption that begins late, in every API: clients of a trail get the sound worker's answer.

Run by `make test-long`. This model's own text becomes a loop after some 400 tokens, so the rule for
loops is off here: what is corrupt is found by its accept length.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab import runtime
from sglang_scaling_fixes.lab.glm import weights
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import tokenizer
from sglang_scaling_fixes.lab.servers.client import Answer
from sglang_scaling_fixes.lab.servers.serve import Options, prompt
from sglang_scaling_fixes.lab.servers.server import Server

from .servers import resting
from .test_resume import Event, folded
from .test_retry import JUDGED_WITHIN, TRAIL, Proxy, kill_once_answers_flow

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SEEDS = range(22, 42)
STREAMS, STREAM_TOKENS = 8, 300
SESSIONS = 16
"""Conversations of each kind, at most: about half of them begin on the worker that corrupts."""
SOUND = Options(
    spec=True,
    text=True,
    tokens=8192,
    flags=(
        *("--plugin", "--spec-guard", "abort", "--spec-guard-after", "64"),
        *("--spec-guard-max-rate", "1"),
    ),
)


def requests(model: str, count: int, seed: int = 0) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of `count` tokens each, greedy."""
    asked = [{"role": "user", "content": tokenizer.text(prompt(450, seed=seed))}]
    common = {"model": model, "temperature": 0, "stream": True}
    chat = {**common, "messages": asked, "max_tokens": count, "ignore_eos": True}
    path = "/v1/chat/completions"
    ids = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
    return {
        "generate": (
            "/generate",
            {"input_ids": prompt(450, seed=seed), "sampling_params": ids, "stream": True},
        ),
        "completions": (
            "/v1/completions",
            {**common, "prompt": prompt(450, seed=seed), "max_tokens": count, "ignore_eos": True},
        ),
        "chat": (path, chat),
        "guided": (path, {**chat, "regex": "(w[0-9]+)+"}),
        "responses": (
            "/v1/responses",
            {
                **common,
                "input": asked[0]["content"],
                "max_output_tokens": count,
                "ignore_eos": True,
            },
        ),
        "messages": ("/v1/messages", {**common, "messages": asked, "max_tokens": count}),
    }


@dataclass
class Fleet:
    good: int
    sound: Server
    bad: Server
    proxy: Proxy

    def anomalies(self) -> int:
        lines = str(self.proxy.get("/metrics").body).splitlines()
        found = [line for line in lines if "anomalies_total{" in line]
        return round(sum(float(line.split()[-1]) for line in found))


@pytest.fixture(scope="module", params=[300, 1000])
def fleet(
    request: pytest.FixtureRequest, new: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    good = request.param
    bad = replace(SOUND, env={runtime.CORRUPT: f"noise:1.0:{good}"})
    with (
        resting(bad, new, tmp_path_factory.mktemp("bad")) as one,
        resting(SOUND, new, tmp_path_factory.mktemp("sound")) as other,
    ):
        servers = [served.servers[0] for served in (one, other)]
        urls = [server.url for server in servers]
        # What was said of a worker is forgotten at once: each kind is to begin on either.
        flags = ("--migrations", "1", "--trail-tokens", TRAIL, "--avoid-seconds", "0.1")
        proxy = Proxy(urls, *flags)
        try:
            yield Fleet(good, servers[1], servers[0], proxy)
        finally:
            proxy.end()


def answered(answer: Answer) -> Any:
    """What a client has of a stream in the end."""
    lines = [line[6:] for line in str(answer.body).splitlines() if line.startswith("data: {")]
    events = [Event(json.loads(line)) for line in lines]
    if "output_ids" in events[-1].data:
        return events[-1].data["output_ids"], events[-1].data["text"]
    return folded(events)


@pytest.mark.parametrize("kind", requests("", 0))
def test_what_is_spoiled_late_is_written_again(fleet: Fleet, kind: str) -> None:
    model = fleet.sound.get("/v1/models").body["data"][0]["id"]
    # A prompt with which the guard tells sound from corrupt: the control.
    for seed in SEEDS:
        path, body = requests(model, fleet.good + JUDGED_WITHIN, seed)[kind]
        right = fleet.sound.post(path, body)
        if right.status == 200 and "kv_anomaly" not in str(right.body):
            spoiled = str(fleet.bad.post(path, body).body)
            if "kv_anomaly" in spoiled:
                break
    else:
        raise AssertionError(f"no prompt is judged rightly: {right.body!s:.300}")
    wanted = answered(right)
    before = fleet.anomalies()
    for number in range(SESSIONS):
        # Another conversation, and perhaps another worker: the text is the same.
        answer = fleet.proxy.post(path, body, session=f"{kind}-{number}")
        assert answered(answer) == wanted
        if fleet.anomalies() > before:
            break
    assert fleet.anomalies() > before


# A call begins with one token and ends with another; between them its arguments are words.
CALL, END = 3, 4
WORDS = {CALL: '<tool_call>{"name":"say","arguments":{"text":"', END: '"}}</tool_call>'}
TOOL = {
    "type": "function",
    "function": {
        "name": "say",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}
GOOD = 300


def calling(seed: int, model: str) -> dict[str, Any]:
    """A chat whose answer is one call: it goes on as it did where its end stood before."""
    draw = random.Random(seed)
    words = [draw.randrange(5, weights.VOCAB) for _ in range(150 + GOOD + JUDGED_WITHIN)]
    begin, arguments = words[:150], words[150:]
    said = {**{number: f"w{number}" for number in words}, **WORDS}
    text = " ".join(said[number] for number in [*begin, CALL, *arguments, END, *begin])
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "tools": [TOOL],
        "temperature": 0,
        "stream": True,
        "max_tokens": len(arguments) + 2,
        "ignore_eos": True,
    }


def called(answer: Answer) -> tuple[str, str, str]:
    """Of a stream: the tool that it calls, with which arguments, and how it ends."""
    lines = [line[6:] for line in str(answer.body).splitlines() if line.startswith("data: {")]
    name = arguments = end = ""
    for line in lines:
        event = json.loads(line)
        assert "error" not in event, line
        for choice in event["choices"]:
            end = choice["finish_reason"] or end
            for call in choice["delta"].get("tool_calls") or []:
                name += call["function"].get("name") or ""
                arguments += call["function"].get("arguments") or ""
    return name, arguments, end


def test_a_tool_call_that_is_spoiled_within_its_arguments_is_called_whole(
    new: Environment, tmp_path: Path
) -> None:
    """A client must not be left with half a call, nor with arguments out of corrupt KV."""
    words = tokenizer.write(tmp_path / "words", weights.VOCAB, WORDS)
    flags = ("--tool-call-parser", "hermes", "--tokenizer-path", str(words))
    sound = replace(SOUND, flags=(*SOUND.flags, *flags))
    bad = replace(sound, env={runtime.CORRUPT: f"noise:1.0:{GOOD}"})
    with (
        resting(bad, new, tmp_path / "bad") as one,
        resting(sound, new, tmp_path / "sound") as other,
    ):
        servers = [served.servers[0] for served in (one, other)]
        more = ("--migrations", "1", "--trail-tokens", TRAIL, "--avoid-seconds", "0.1")
        fleet = Fleet(GOOD, servers[1], servers[0], Proxy([s.url for s in servers], *more))
        model = fleet.sound.get("/v1/models").body["data"][0]["id"]
        try:
            path = "/v1/chat/completions"
            for seed in SEEDS:
                body = calling(seed, model)
                right = fleet.sound.post(path, body)
                if "kv_anomaly" not in str(right.body) and "kv_anomaly" in str(
                    fleet.bad.post(path, body).body
                ):
                    break
            else:
                raise AssertionError(f"no prompt is judged rightly: {right.body!s:.300}")
            wanted = called(right)
            assert wanted[0] == "say"
            assert len(json.loads(wanted[1])["text"].split()) == GOOD + JUDGED_WITHIN
            before = fleet.anomalies()
            for number in range(SESSIONS):
                assert called(fleet.proxy.post(path, body, session=f"call-{number}")) == wanted
                if fleet.anomalies() > before:
                    break
            assert fleet.anomalies() > before
        finally:
            fleet.proxy.end()


def test_a_killed_workers_streams_go_on_without_the_plugin(
    new: Environment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Stock workers: the next one's prompt has the tokens so far."""
    stock = Options(text=True, tokens=8192)
    with (
        resting(stock, new, tmp_path_factory.mktemp("one")) as one,
        resting(stock, new, tmp_path_factory.mktemp("other")) as other,
    ):
        proxy = Proxy([w.servers[0].url for w in (one, other)], "--migrations", "1")
        # The short one ends first, and then the worker is killed under the others.
        lengths = [20, *[STREAM_TOKENS] * STREAMS]
        bodies = [requests("", count, seed)["generate"] for seed, count in enumerate(lengths)]
        try:
            wanted = [answered(other.servers[0].post(*body)) for body in bodies]
            with ThreadPoolExecutor(len(bodies) + 1) as pool:
                killed = pool.submit(kill_once_answers_flow, proxy, one)
                asked = [
                    pool.submit(proxy.post, *body, session=str(number))
                    for number, body in enumerate(bodies)
                ]
                killed.result()
                found = [answered(answer.result()) for answer in asked]
            assert found == wanted
            assert 'migrations_total{reason="lost"}' in str(proxy.get("/metrics").body)
        finally:
            proxy.end()
