"""The anomaly guard on real speculative decoding, with KV overwritten under running requests."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
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
from sglang_scaling_fixes.specguard.settings import SECRET_FLAG
from sglang_scaling_fixes.vouch import (
    FALSE_ALARM,
    FALSE_ALARM_PATH,
    FRESH,
    HEADER,
    UNGUARDED,
    vouch,
)

from .servers import resting

pytestmark = pytest.mark.e2e

PROMPT = prompt(450, seed=7)
TOKENS = 120
SECRET = b"0123456789abcdef0123456789abcdef"
FOR_EVER = 2**33
ANOMALOUS = (22, 23, 25, 28)
"""Seeds of prompts with which no kind of corruption is made good by copying (see the docs). Each
test has its own: a beginning is moved once in a while only."""
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


def generate(served: Served, rid: str, asked: list[int] = PROMPT, **options: object) -> Any:
    return served.servers[0].post("/generate", {**greedy(asked, TOKENS), "rid": rid, **options})


def corrupted(kind: str, name: str) -> str:
    return f"corrupt:{kind}:1.0:{AFTER}:{name}"


def clean(served: Served, name: str, asked: list[int] = PROMPT) -> dict[str, Any]:
    answer = generate(served, f"clean:{name}", asked)
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
    folder = tmp_path_factory.mktemp("abort")
    with resting(with_secret(ABORT, folder), new, folder) as served:
        yield served


def with_secret(options: Options, folder: Path) -> Options:
    file = folder / "secret"
    file.write_bytes(SECRET)
    return replace(options, flags=(*options.flags, SECRET_FLAG, str(file)))


@pytest.fixture(scope="module")
def right(aborting: Served) -> list[int]:
    """What the prompt is answered with by sound KV."""
    return list(clean(aborting, "first")["output_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_request_ends_with_503_and_its_retry_here_is_right(
    aborting: Served, kind: str
) -> None:
    asked = prompt(450, seed=ANOMALOUS[KINDS.index(kind)])
    right = clean(aborting, f"before {kind}", asked)["output_ids"]
    answer = generate(aborting, corrupted(kind, "once"), asked)
    assert answer.status == 503
    assert (answer.body["type"], answer.body["code"]) == ("kv_anomaly", 503)
    assert answer.body["message"].startswith("kv_anomaly: accept length 1.")
    assert answer.body["message"].endswith(" suspect_from=0]")
    again = clean(aborting, f"after {kind}", asked)
    assert again["meta_info"]["cached_tokens"] == 0  # not even the prompt
    assert again["output_ids"] == right
    # And its own KV is good to be read again.
    third = clean(aborting, f"third {kind}", asked)
    assert third["meta_info"]["cached_tokens"] > len(PROMPT) - 64
    assert third["output_ids"] == right


def test_a_repetition_moves_those_who_share_its_beginning_once_and_a_false_alarm_moves_them_back(
    aborting: Served,
) -> None:
    """Others find what they share cached again, however often somebody is called an anomaly."""
    shared = prompt(300, seed=30)
    other, loud = [*shared, *prompt(60, seed=31)], [*shared, *PROMPT[300:]]
    clean(aborting, "warm", other)
    names = []
    for number, cached in enumerate((0, 300, 300)):
        answer = generate(aborting, corrupted("noise", f"loud-{number}"), loud)
        assert answer.status == 503
        names.append(answer.body["message"].partition("suspicion=")[2].partition(" ")[0])
        found = clean(aborting, f"other-{number}", other)["meta_info"]["cached_tokens"]
        assert found >= cached - 64 and (found > 0) == (cached > 0)
    server = aborting.servers[0]
    before = guard(aborting)
    assert post_word(server, "x" * 40) == 403
    assert post_word(server, vouch(SECRET, FALSE_ALARM, names[0], FOR_EVER)) == 204
    after = guard(aborting)
    assert after["suspicions"] == before["suspicions"] - 1
    assert after["suspicions_ended"]["false_alarm"] == 1
    assert clean(aborting, "back", other)["meta_info"]["cached_tokens"] >= 300 - 64


def post_word(server: Any, word: str) -> int:
    request = urllib.request.Request(
        f"{server.url}{FALSE_ALARM_PATH}", b"", {HEADER: word}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_the_proxys_words_reach_the_guard_through_every_api(aborting: Served, path: str) -> None:
    """Stock lets them through to the scheduler, whatever else it makes of a namespace."""
    server = aborting.servers[0]
    model = server.get("/v1/models").body["data"][0]["id"]
    asked = PROMPT
    bodies: dict[str, dict[str, Any]] = {
        "/generate": greedy(asked, TOKENS),
        "/v1/completions": {"prompt": asked, "max_tokens": TOKENS},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": tokenizer.text(asked)}],
            "max_tokens": TOKENS,
        },
    }

    def send(name: str, word: str) -> Any:
        rid = corrupted("noise", f"word-{name}{path}")
        common = {"request_id": rid, "model": model, "temperature": 0, "ignore_eos": True}
        body = bodies[path] if path == "/generate" else {**bodies[path], **common}
        return server.post(path, {**body, "rid": rid, "extra_key": word})

    before = guard(aborting)
    assert send("fresh", vouch(SECRET, FRESH, "n1", FOR_EVER)).status == 503
    assert (
        send("forged", vouch(b"another secret, not that one", UNGUARDED, "n2", FOR_EVER)).status
        == 503
    )
    assert send("late", vouch(SECRET, UNGUARDED, "n3", 1)).status == 503
    assert send("unguarded", vouch(SECRET, UNGUARDED, "n4", FOR_EVER)).status == 200
    after = guard(aborting)
    assert after["accusations"]["unshared"] == before["accusations"].get("unshared", 0) + 1
    seen = before["anomalies"].get("low_accept_length/false_alarm", 0)
    assert after["anomalies"]["low_accept_length/false_alarm"] == seen + 1


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
    assert (reason["rule"], reason["suspect_from"]) == ("low_accept_length", 0)
    assert reason["message"].endswith(f"suspicion={reason['suspicion']} suspect_from=0]")


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


def test_a_prefix_in_the_host_tier_is_suspect_too(aborting: Served) -> None:
    """HiCache writes a prompt through as soon as it is computed, before anything is known of it."""
    asked = prompt(450, seed=ANOMALOUS[-1])
    right = clean(aborting, "cached", asked)["output_ids"]
    push_out(aborting)
    assert clean(aborting, "read", asked)["meta_info"]["cached_tokens_details"]["host"] > 0
    assert generate(aborting, corrupted("mixed", "host"), asked).status == 503
    push_out(aborting)
    again = clean(aborting, "host", asked)
    assert again["meta_info"]["cached_tokens"] == 0
    assert again["output_ids"] == right


def test_decode_tells_prefill(new: Environment, tmp_path: Path) -> None:
    """Its copy of the prompt's KV, which it would read again, is read no more."""
    options = replace(ABORT, pd=True, text=False, hicache=False, tokens=4096)
    with resting(with_secret(options, tmp_path), new, tmp_path) as served:
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
        name = ended.decode.body["message"].partition("suspicion=")[2].partition(" ")[0]
        decode = served.servers[0]
        assert post_word(decode, vouch(SECRET, FALSE_ALARM, name, FOR_EVER)) == 204
        assert guard(served)["notifications"] == {"delivered": 2}
        assert guard(served)["suspicions"] == 0
        # The old namespace again, on prefill: what it computed since then is in the other one.
        third = served.ask(PROMPT, 1).prefill["cached_tokens"]
        assert third > 0


def test_the_vocabulary_of_the_lab_fits_its_words() -> None:
    assert tokenizer.ids(tokenizer.text(PROMPT)) == PROMPT
    assert max(PROMPT) < weights.VOCAB
