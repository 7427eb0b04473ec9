"""Resumed through a prefill/decode pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import link
from sglang_scaling_fixes.lab.servers.pending import Outcome
from sglang_scaling_fixes.resume.wire import FIELD

from .test_resume import CUTS, FEW, KINDS, PROMPT, TOKENS, body, of_bytes, read, so_far

pytestmark = pytest.mark.e2e


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
