"""The split pool under the tiny GLM-5.1: the dense model's answer, whoever owns the layer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab import runtime
from sglang_scaling_fixes.lab.faults import forgetful
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.serve import Options, Served, prompt
from sglang_scaling_fixes.layersplit import scratch

from .servers import report, resting
from .test_tiny_glm import (
    ASK,
    PROMPTS,
    SAME,
    SLOW_LOADS,
    SMALL,
    SMALL_HOST,
    TOKENS,
    assert_dense_agrees,
    log_probabilities,
)

pytestmark = pytest.mark.e2e

PAGE = 64
LAYERS = 8  # over 2 ranks 4 and 4, over 4 ranks 2 each
SPLIT = Options(
    pd=True,
    cp=2,
    layer_split=True,
    layers=LAYERS,
    prefill_flags=("--plugin", "safe-reclaim,layer-split,hicache-ordering"),
    decode_flags=("--plugin", "safe-reclaim", "--safe-reclaim-audit"),
    env={runtime.SLOW: "0.02"},
)
LOADED = replace(
    SPLIT,
    hicache=True,
    spec=True,
    tokens=SMALL,
    flags=SMALL_HOST,
    env={**SPLIT.env, **SLOW_LOADS},
)


def dense(new: Environment, packed: bool = False) -> Any:
    from sglang_scaling_fixes.lab.glm.dense import DenseGLM

    return DenseGLM(checkpoints.tiny_glm(new, layers=LAYERS).folder, packed=packed)


def split(served: Served) -> dict[str, Any]:
    """What the pool of the prefill's first rank has counted."""
    assert served.cluster is not None
    state = served.cluster.fast.get("/server_info").body["internal_states"][0]
    counted: dict[str, Any] = state["sglang_scaling_fixes"]["layer_split"]
    return counted


def asked_at_once(served: Served, prompts: Sequence[Sequence[int]]) -> list[Any]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda ids: served.ask(ids, TOKENS, ASK), prompts))


def sharing(length: int = 240) -> list[list[int]]:
    """Prompts that share a beginning and go on apart, one of them by a single token."""
    common = prompt(length, seed=9)[:128]
    return [common + prompt(60, seed=20 + i)[: (1, 40, 60)[i]] for i in range(3)]


def test_answers_are_the_dense_models_with_drafts_and_after_a_load_back(
    new: Environment, tmp_path: Path
) -> None:
    model = dense(new)
    with resting(LOADED, new, tmp_path) as served:
        first = [served.ask(ids, TOKENS, ASK) for ids in PROMPTS]
        again = [served.ask(ids, TOKENS, ASK) for ids in PROMPTS]
        for reply in again:
            assert reply.prefill["cached_tokens_details"]["device"] > 0
        for seed in range(4):  # what the prompts had is gone from the device
            served.ask(prompt(300, seed=100 + seed), 1)
        loaded = [served.ask(ids, TOKENS, ASK) for ids in PROMPTS]
        for reply in loaded:
            assert reply.prefill["cached_tokens_details"]["host"] > 0
        served.ask(sharing()[0], 1)
        shared = asked_at_once(served, sharing())
        for ids, *replies in zip(PROMPTS, first, again, loaded, strict=True):
            for reply in replies:
                assert_dense_agrees(model, ids, reply)
        for ids, reply in zip(sharing(), shared, strict=True):
            assert_dense_agrees(model, ids, reply)
        counted = split(served)
        # KV and index keys of the pages in use, once for each layer: bf16 has 576 values.
        assert counted["bytes"] == counted["pages"] * PAGE * (2 * 576 + 132) * LAYERS > 0
        assert counted["host_waits"] == 0
        assert counted["exposed_ms"] > 0  # 20 ms a layer show somewhere
        assert served.cluster is not None
        held = report(served.cluster)
        assert held["exposures"] == held["landed"] == served.cluster.requests
        assert held["held_tokens"] == 0


@pytest.mark.parametrize(
    ("ranks", "packed"),
    [
        pytest.param(2, True, marks=pytest.mark.long),
        *(pytest.param(4, packed, marks=pytest.mark.long) for packed in (True, False)),
    ],
)
def test_every_rank_reads_the_layers_of_every_other(
    new: Environment, tmp_path: Path, ranks: int, packed: bool
) -> None:
    model = dense(new, packed)
    options = replace(SPLIT, cp=ranks, packed=packed)
    with resting(options, new, tmp_path) as served:
        for _ in range(2):
            for ids in PROMPTS:
                assert_dense_agrees(model, ids, served.ask(ids, TOKENS, ASK))
        for ids, reply in zip(sharing(), asked_at_once(served, sharing()), strict=True):
            assert_dense_agrees(model, ids, reply)
        assert split(served)["broadcasts"] > 0


CONTEXT, CHUNK, REQUESTS = 320, 256, 8
LEAST = scratch.least(CONTEXT, CHUNK, REQUESTS, PAGE)


@pytest.mark.long
@pytest.mark.parametrize(("tokens", "waits"), [(LEAST, True), (LEAST + 3 * CONTEXT, False)])
def test_a_prefix_that_does_not_fit_the_scratch_waits_its_turn(
    new: Environment, tmp_path: Path, tokens: int, waits: bool
) -> None:
    """Three prompts at once, each with a prefix of four pages. The smaller scratch has five."""
    model = dense(new)
    sizes = {
        "--context-length": CONTEXT,
        "--chunked-prefill-size": CHUNK,
        "--max-running-requests": REQUESTS,
        "--layer-split-scratch-tokens": tokens,
    }
    flags = [str(part) for pair in sizes.items() for part in pair]
    options = replace(SPLIT, prefill_flags=(*SPLIT.prefill_flags, *flags))
    prompts = [prompt(CONTEXT - TOKENS - 10, seed=40 + i) for i in range(3)]
    with resting(options, new, tmp_path) as served:
        for ids in prompts:
            served.ask(ids, 1)
        for _ in range(2):
            for ids, reply in zip(prompts, asked_at_once(served, prompts), strict=True):
                assert reply.prefill["cached_tokens"] == 4 * PAGE
                assert_dense_agrees(model, ids, reply)
        counted = split(served)
        assert (counted["deferred"] > 0) == waits
        assert counted["host_waits"] == 0  # where they fit, several prefixes were in one pass


@pytest.mark.long
def test_control_a_forgotten_wait_changes_answers(new: Environment, tmp_path: Path) -> None:
    env = {**SPLIT.env, runtime.FORGET: forgetful.SPLIT_WAIT}
    off = []
    with resting(replace(SPLIT, env=env), new, tmp_path) as served:
        for ids in PROMPTS:
            first, again = (log_probabilities(served.ask(ids, TOKENS, ASK)) for _ in range(2))
            off.append(max(abs(a - b) for a, b in zip(first, again, strict=True)))
    assert max(off) > SAME
