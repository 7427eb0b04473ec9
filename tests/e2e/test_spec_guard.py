"""The anomaly guard on real speculative decoding, with KV overwritten under running requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab import runtime
from sglang_scaling_fixes.lab.faults.corrupt import KINDS
from sglang_scaling_fixes.lab.glm import weights
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import tokenizer
from sglang_scaling_fixes.lab.servers.pending import greedy
from sglang_scaling_fixes.lab.servers.serve import Options, Served, prompt

from .servers import resting

pytestmark = pytest.mark.e2e

PROMPT = prompt(450, seed=7)
TOKENS = 120
AFTER = 10
JUDGED = "64"  # sooner than by default: a corrupt request takes a step per token
OBSERVE = Options(
    spec=True,
    text=True,
    env={runtime.CORRUPT: "1"},
    flags=("--plugin", "--spec-guard", "observe", "--spec-guard-after", JUDGED),
)
ABORT = replace(
    OBSERVE,
    hicache=True,
    tokens=1024,  # few: other prompts soon push one out to the host tier
    flags=("--plugin", "--spec-guard", "abort", "--spec-guard-after", JUDGED, "--enable-metrics"),
)


def generate(served: Served, rid: str, **options: object) -> Any:
    return served.servers[0].post("/generate", {**greedy(PROMPT, TOKENS), "rid": rid, **options})


def corrupted(kind: str, name: str) -> str:
    return f"corrupt:{kind}:1.0:{AFTER}:{name}"


def clean(served: Served, name: str) -> dict[str, Any]:
    answer = generate(served, f"clean:{name}")
    assert answer.status == 200, answer.body
    return dict(answer.body)


def events(body: str) -> list[Any]:
    """The JSON of a stream's events; its end is checked."""
    lines = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def guard(served: Served) -> dict[str, Any]:
    info = served.servers[0].get("/server_info").body
    return dict(info["internal_states"][0]["sglang_scaling_fixes"]["spec_guard"])


@pytest.fixture(scope="module")
def aborting(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with resting(ABORT, new, tmp_path_factory.mktemp("abort")) as served:
        yield served


@pytest.fixture(scope="module")
def right(aborting: Served) -> list[int]:
    """What the prompt is answered with by sound KV."""
    return list(clean(aborting, "first")["output_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_request_ends_with_503_and_its_retry_here_is_right(
    aborting: Served, right: list[int], kind: str
) -> None:
    answer = generate(aborting, corrupted(kind, "once"))
    assert answer.status == 503
    assert (answer.body["type"], answer.body["code"]) == ("kv_anomaly", 503)
    assert answer.body["message"].startswith("kv_anomaly: accept length 1.")
    again = clean(aborting, f"after {kind}")
    assert again["meta_info"]["cached_tokens"] == 0  # not even the prompt
    assert again["output_ids"] == right
    # And its own KV is good to be read again.
    third = clean(aborting, f"third {kind}")
    assert third["meta_info"]["cached_tokens"] > len(PROMPT) - 64
    assert third["output_ids"] == right


def test_observing_changes_nothing_and_the_retry_reads_what_is_corrupt(
    new: Environment, tmp_path: Path
) -> None:
    """The control: stock keeps the request going, and its KV in the radix tree."""
    with resting(OBSERVE, new, tmp_path) as served:
        base = clean(served, "first")["output_ids"]
        answer = generate(served, corrupted("noise", "observed"))
        assert answer.status == 200
        assert len(answer.body["output_ids"]) == TOKENS
        assert answer.body["output_ids"] != base
        again = clean(served, "after")
        assert again["meta_info"]["cached_tokens"] > 0
        assert again["output_ids"] != base
        seen = guard(served)
        assert seen["anomalies"]["low_accept_length/observed"] >= 1
        assert seen["suspect_namespaces"] == 0


def test_a_stream_ends_with_the_abort(aborting: Served, right: list[int]) -> None:
    del right
    chunks = events(generate(aborting, corrupted("noise", "stream"), stream=True).body)
    reason = chunks[-1]["meta_info"]["finish_reason"]
    assert (reason["type"], reason["status_code"]) == ("abort", 503)
    assert reason["err_type"] == "kv_anomaly"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": TOKENS}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": tokenizer.text(PROMPT)}],
                "max_tokens": TOKENS,
            },
        ),
        ("/v1/responses", {"input": tokenizer.text(PROMPT), "max_output_tokens": TOKENS}),
    ],
    ids=["completions", "chat", "responses"],
)
def test_the_openai_api_names_the_anomaly(
    aborting: Served, path: str, body: dict[str, object], stream: bool
) -> None:
    server = aborting.servers[0]
    model = server.get("/v1/models").body["data"][0]["id"]
    rid = corrupted("noise", f"{path}-{stream}")
    extra = {"rid": rid, "request_id": rid, "model": model, "temperature": 0, "ignore_eos": True}
    answer = server.post(path, {**body, **extra, "stream": stream})
    if not stream:
        error = answer.body.get("error", answer.body)
        assert answer.status == 503
    else:
        assert answer.status == 200
        last = events(answer.body)[-1]
        error = last.get("error") or last["response"]["error"]
    assert error["message"].startswith("kv_anomaly: ")
    if not (stream and path == "/v1/responses"):  # its events have codes of their own
        assert (error["type"], error["code"]) == ("kv_anomaly", 503)


def test_an_anomaly_is_counted_and_logged_once(aborting: Served) -> None:
    rid = corrupted("zero", "counted")
    before = guard(aborting)["anomalies"].get("low_accept_length/aborted", 0)
    assert generate(aborting, rid).status == 503
    assert guard(aborting)["anomalies"]["low_accept_length/aborted"] == before + 1
    (line,) = (
        line for line in aborting.servers[0].process.log.read_text().splitlines() if rid in line
        and '"event": "kv_anomaly"' in line
    )  # fmt: skip
    said = json.loads(line[line.index("{") :])
    assert said["action"] == "aborted"
    assert said["kind"] == "low_accept_length"
    assert said["prompt_tokens"] == len(PROMPT)
    assert said["value"] < said["threshold"] == 1.4
    (series,) = (
        line
        for line in str(aborting.servers[0].get("/metrics").body).splitlines()
        if line.startswith("sglang_scaling_fixes_spec_guard_anomalies_total{")
        and 'action="aborted"' in line
        and 'kind="low_accept_length"' in line
    )
    assert float(series.split()[-1]) == before + 1


def push_out(served: Served) -> None:
    """Other prompts, until what was cached before is in the host tier only."""
    for seed in range(4):
        served.ask(prompt(300, seed=100 + seed), 1)


def test_a_prefix_in_the_host_tier_is_suspect_too(aborting: Served, right: list[int]) -> None:
    """HiCache writes a prompt through as soon as it is computed, before anything is known of it."""
    clean(aborting, "cached")
    push_out(aborting)
    assert clean(aborting, "read")["meta_info"]["cached_tokens_details"]["host"] > 0
    assert generate(aborting, corrupted("mixed", "host")).status == 503
    push_out(aborting)
    again = clean(aborting, "host")
    assert again["meta_info"]["cached_tokens"] == 0
    assert again["output_ids"] == right


def test_decode_tells_prefill(new: Environment, tmp_path: Path) -> None:
    """Its copy of the prompt's KV, which it would read again, is read no more."""
    options = replace(ABORT, pd=True, text=False, hicache=False, tokens=4096)
    with resting(options, new, tmp_path) as served:
        base = served.ask(PROMPT, TOKENS)
        assert served.ask(PROMPT, 1).prefill["cached_tokens"] > 0
        assert served.cluster is not None
        ended = served.cluster.send(
            served.cluster.fast, PROMPT, corrupted("noise", "pd"), max_new_tokens=TOKENS
        ).wait()
        assert ended.decode.status == 503
        again = served.ask(PROMPT, TOKENS)
        assert again.prefill["cached_tokens"] == 0
        assert again.ids == base.ids
        assert guard(served)["notifications"] == {"delivered": 1}


def test_the_vocabulary_of_the_lab_fits_its_words() -> None:
    assert tokenizer.ids(tokenizer.text(PROMPT)) == PROMPT
    assert max(PROMPT) < weights.VOCAB
