"""Resumed with drafts, and through a prefill/decode pair; in deltas, and in mid-thought."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers import server as lab_server
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.pending import Outcome
from sglang_scaling_fixes.lab.servers.serve import SPEC_FLAGS
from sglang_scaling_fixes.lab.servers.server import COMMON_FLAGS
from sglang_scaling_fixes.resume.wire import FIELD

from .test_resume import (
    CHAT,
    CUTS,
    FEW,
    KINDS,
    PROMPT,
    REQUESTS,
    TOKENS,
    Worker,
    alone,
    body,
    folded,
    named,
    of_bytes,
    read,
    so_far,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def drafting(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """MTP, outputs as deltas, and every answer begins with a thought."""
    flags = "--sleep-on-idle", *SPEC_FLAGS, "--incremental-streaming-output"
    parser = "--reasoning-parser", "deepseek-r1"
    model = checkpoints.tiny_glm
    with alone(new, "drafting", tmp_path_factory, *flags, *parser, model=model) as server:
        yield named(server)


@pytest.mark.parametrize("kind", ["plain", "schema", "characters"])
def test_with_drafts_it_goes_on_as_if_never_cut(drafting: Worker, kind: str) -> None:
    options = KINDS[kind]
    whole = drafting.generate(**options)
    ids = whole["output_ids"]
    request = body(**options)
    streamed = drafting.stream("/generate", request)
    assert streamed.ids == ids
    for cut in [cut for cut in CUTS if cut < len(ids)]:
        before = drafting.counted()["tokens"]
        resumed = drafting.generate(ids[:cut], **options)
        assert (resumed["output_ids"], resumed["text"]) == (ids, whole["text"]), cut
        assert drafting.counted()["tokens"] - before == cut
    # Cut between two events: the deltas that follow are the rest, however drafts group them.
    for cut in sorted({event.tokens for event in streamed.events})[:-1:5]:
        part = drafting.stream("/generate", request, ids[:cut])
        assert part.ids == ids
        rest = [event.data["text"] for event in streamed.events if event.tokens > cut]
        assert "".join(event.data["text"] for event in part.events) == "".join(rest)


def test_a_thought_goes_on(drafting: Worker) -> None:
    request = {**CHAT, "model": drafting.model, "temperature": 0}
    path = "/v1/chat/completions"
    whole = drafting.stream(path, request)

    def thought(events: list[Any]) -> str:
        deltas = [choice["delta"] for event in events for choice in event.data["choices"]]
        assert not any(delta.get("content") for delta in deltas)
        return "".join(delta.get("reasoning_content") or "" for delta in deltas)

    assert thought(whole.events)
    for cut in sorted({event.tokens for event in whole.events} - {0})[:-1:4]:
        part = drafting.stream(path, request, whole.ids[:cut])
        assert part.ids == whole.ids
        assert thought(part.events) == thought(whole.after(cut))
        usages = [stream.events[-1].data["usage"] for stream in (part, whole)]
        # Stock counts tokens of thought that a verification accepts beyond the limit.
        counts = [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages]
        assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def overlapping(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A step is prepared before the one before it has been read, as on a GPU."""
    flags = tuple(flag for flag in COMMON_FLAGS if flag != "--disable-overlap-schedule")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lab_server, "COMMON_FLAGS", flags)
        with alone(new, "overlapping", tmp_path_factory) as server:
            info = server.get("/server_info").body
            assert info["disable_overlap_schedule"] is False
            yield Worker(server, "model")


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_overlap_schedule_tokens_are_counted_as_late(
    overlapping: Worker, kind: str
) -> None:
    options = KINDS[kind]
    ids = overlapping.generate(**options)["output_ids"]
    for cut in [cut for cut in (*CUTS, 2, 12, 30) if cut < len(ids)]:
        assert overlapping.generate(ids[:cut], **options)["output_ids"] == ids, cut


@pytest.fixture(scope="module")
def older(old: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A release whose requests hold lists. It has no grammars on a CPU, and its /v1/responses sends
    nothing before the answer is whole."""
    with alone(old, "older", tmp_path_factory) as server:
        yield named(server)


@pytest.mark.parametrize("kind", ["plain", "frequency", "presence", "repetition"])
def test_an_older_release_goes_on_as_if_never_cut(older: Worker, kind: str) -> None:
    options = KINDS[kind]
    whole = older.generate(**options)
    for cut in CUTS:
        before = older.counted()["tokens"]
        resumed = older.generate(whole["output_ids"][:cut], **options)
        assert (resumed["output_ids"], resumed["text"]) == (whole["output_ids"], whole["text"])
        assert older.counted()["tokens"] - before == cut


@pytest.mark.parametrize("kind", ["completions", "chat", "messages"])
def test_a_stream_of_an_older_release_goes_on(older: Worker, kind: str) -> None:
    path, request = REQUESTS[kind]
    request = {**request, "model": older.model, "temperature": 0}
    whole = older.stream(path, request)
    assert whole.cuts(6)
    for cut in whole.cuts(6):
        resumed = older.stream(path, request, whole.ids[:cut])
        assert resumed.ids == whole.ids, cut
        assert folded(resumed.events) == folded(whole.after(cut)), cut


@pytest.mark.parametrize("stream", [False, True])
def test_an_older_release_refuses_what_has_ended(older: Worker, stream: bool) -> None:
    answer = older.post("/generate", body([300] * TOKENS, stream=stream))
    assert answer.status == 400
    assert "nothing is left to generate" in answer.body["error"]["message"]
    stop = {"stop": ["w300w30"]}
    answer = older.post("/generate", body([300, 301, 302, 303], stream=stream, **stop))
    assert answer.status == 400 and "'w300w30'" in answer.body["error"]["message"]


@pytest.fixture(scope="module")
def pair(new: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir: Path = tmp_path_factory.mktemp("pair")
    spec = ClusterSpec(
        prefills=1,
        flags=("--plugin", "--chunked-prefill-size", "64", "--page-size", "16"),
        sleep_on_idle=True,
    )
    model = of_bytes(checkpoints.llama(new))
    with link(0, run_dir, shaped=False) as way, Cluster(new, model, way, run_dir, spec) as cluster:
        yield cluster


def ask(pair: Cluster, given: list[int] | None = None, **options: Any) -> Outcome:
    request = body(given, **options)
    return pair.send(
        pair.fast,
        request.pop("input_ids"),
        f"r{pair.requests}",
        max_new_tokens=TOKENS,
        options=request,
    ).wait()


def send(pair: Cluster, request: dict[str, Any]) -> Outcome:
    prompt = request.pop("input_ids")
    rid = f"r{pair.requests}"
    return pair.send(pair.fast, prompt, rid, max_new_tokens=TOKENS, options=request).wait()


# Additive penalties and that for repetition do not commute, and without the overlap schedule stock
# applies them in the order of a set of classes, which differs from process to process.
ALL = {key: value for key, value in KINDS["all penalties"].items() if key != "repetition_penalty"}
PAIR_KINDS = {**KINDS, "all penalties": ALL}


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_a_pair_goes_on_as_if_never_cut(pair: Cluster, kind: str) -> None:
    options = PAIR_KINDS[kind]
    whole = ask(pair, **options).decode.body
    ids = whole["output_ids"]
    for cut in [cut for cut in CUTS if cut < len(ids)]:
        resumed = ask(pair, ids[:cut], **options).decode.body
        assert resumed["output_ids"] == ids, cut
        assert resumed["text"] == whole["text"]
        for count in ("prompt_tokens", "completion_tokens", "finish_reason"):
            assert resumed["meta_info"][count] == whole["meta_info"][count]
    state = pair.decode.get("/server_info").body["internal_states"][0]
    assert state["sglang_scaling_fixes"]["resume"]["requests"] >= 1


@pytest.mark.parametrize("kind", ["frequency", "schema"])
def test_a_pairs_longer_prompt_goes_elsewhere(pair: Cluster, kind: str) -> None:
    """The control: without the field."""
    options = KINDS[kind]
    ids = ask(pair, **options).decode.body["output_ids"]
    differ = 0
    for cut in [cut for cut in CUTS if cut < len(ids)]:
        request = body(**options)
        request["input_ids"] = PROMPT + ids[:cut]
        request["sampling_params"]["max_new_tokens"] -= cut
        differ += ids[:cut] + send(pair, request).decode.body["output_ids"] != ids
    assert differ


def test_a_stream_of_a_pair_goes_on_with_what_is_new(pair: Cluster) -> None:
    options: dict[str, Any] = {"logit_bias": FEW, "frequency_penalty": 1.0}

    def streamed(given: list[int]) -> Any:
        request = body(stream=True, **options)
        request[FIELD] = {"output_ids": given, "report_ids": True}
        return read(send(pair, request).decode.body, given)

    whole = streamed([])
    for cut in CUTS:
        part = streamed(whole.ids[:cut])
        assert part.ids == whole.ids
        assert so_far(part.events[0])[0] > cut
        assert so_far(part.events[-1]) == so_far(whole.events[-1])


def test_a_pairs_log_probabilities_are_those_of_the_new_tokens(pair: Cluster) -> None:
    whole = ask(pair, return_logprob=True).decode.body
    values = whole["meta_info"]["output_token_logprobs"]
    for cut in CUTS:
        resumed = ask(pair, whole["output_ids"][:cut], return_logprob=True).decode.body
        assert resumed["output_ids"] == whole["output_ids"]
        found = resumed["meta_info"]["output_token_logprobs"]
        assert [entry[1] for entry in found] == [entry[1] for entry in values[cut:]]


def test_both_halves_of_a_pair_refuse_alike(pair: Cluster) -> None:
    outcome = ask(pair, [1] * TOKENS)
    assert outcome.prefill is not None
    for answer in (outcome.decode, outcome.prefill):
        assert answer.status == 400
        assert "nothing is left to generate" in json.dumps(answer.body)
    assert ask(pair).ids
