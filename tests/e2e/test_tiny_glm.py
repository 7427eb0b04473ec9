"""The tiny GLM-5.1 through stock SGLang, in every combination: always the dense model's answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab import runtime
from sglang_scaling_fixes.lab.faults import corrupt, forgetful
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.servers import checkpoints, serve
from sglang_scaling_fixes.lab.servers.serve import Options, Reply, prompt

from .servers import report, resting

pytestmark = pytest.mark.e2e

TOKENS = 24
PROMPTS = (
    prompt(240, seed=1),
    prompt(90, seed=2),
    prompt(300, seed=4)[:180],  # nothing repeats itself: noise decides
)
SAME = 1e-3  # of a server's log-probabilities with and without a load-back
# A tenth of a second of the load stream before each layer's copy, by stock's own test knob.
SLOW_LOADS = {"SGLANG_TEST_HICACHE_H2D_DELAY_CYCLES": "100000000"}
SMALL = 1024  # so few slots that a prompt is gone from the device once others have been there
# Four times as many on the host, some MB. Stock refuses to start unless its 10 GB reserve and the
# host pool are free; a pool of 1 GB and its index were refused beside other servers.
SMALL_HOST = ("--hicache-size", "0", "--hicache-ratio", "4")
ASK = {"return_logprob": True}
ARMED = ("--plugin", "--safe-reclaim-audit")
ORDERED = ("--plugin", "hicache-ordering")
SPLIT = Options(pd=True, cp=2, layer_split=True)


@pytest.fixture(scope="session")
def dense(new: Environment) -> Any:
    from sglang_scaling_fixes.lab.glm.dense import DenseGLM

    return DenseGLM(checkpoints.tiny_glm(new).folder)


def log_probabilities(reply: Reply) -> list[float]:
    return [entry[0] for entry in reply.meta["output_token_logprobs"]]


def assert_dense_agrees(dense: Any, asked: Sequence[int], reply: Reply) -> None:
    """Greedy decoding of the dense model appends these ids, with these log-probabilities."""
    from sglang_scaling_fixes.lab.glm.dense import TOLERANCE

    logits = dense.logits([*asked, *reply.ids])[len(asked) - 1 : -1]
    assert logits.argmax(-1).tolist() == reply.ids
    said = logits.log_softmax(-1).max(-1).values.tolist()
    assert log_probabilities(reply) == pytest.approx(said, abs=TOLERANCE)


FEATURES = ("pd", "hicache", "spec")
COMBINATIONS = [
    combination
    for count in range(len(FEATURES) + 1)
    for combination in itertools.combinations(FEATURES, count)
]
SHORT = (("hicache",), FEATURES)
"""Those in which each feature and each pair of features meets the dense model."""


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(
            features,
            id="+".join(features) or "plain",
            marks=() if features in SHORT else pytest.mark.long,
        )
        for features in COMBINATIONS
    ],
)
def test_every_combination_answers_as_the_dense_model(
    new: Environment, dense: Any, tmp_path: Path, features: tuple[str, ...]
) -> None:
    """Pairs with drafts are armed: safe reclaim then holds latent KV, the draft's, and index-K.
    One server with HiCache alone is armed too: a load-back changes nothing then either."""
    pd, hicache, spec = (name in features for name in FEATURES)
    armed = pd and spec
    ordered = features == ("hicache",)
    options = Options(
        pd=pd,
        hicache=hicache,
        spec=spec,
        tokens=SMALL if hicache else serve.TOKENS,
        flags=(
            *(ARMED if armed else ORDERED if ordered else ()),
            *(SMALL_HOST if hicache else ()),
        ),
        env=SLOW_LOADS,
    )
    with resting(options, new, tmp_path) as served:
        replies = [served.ask(asked, TOKENS, ASK) for asked in PROMPTS]
        for asked, reply in zip(PROMPTS, replies, strict=True):
            assert len(reply.ids) == TOKENS
            assert_dense_agrees(dense, asked, reply)
            if spec:
                assert reply.meta["spec_num_correct_drafts"] > 0
        if hicache:
            for seed in range(4):
                served.ask(prompt(300, seed=100 + seed), 1)
            again = served.ask(PROMPTS[0], TOKENS, ASK)
            assert again.prefill["cached_tokens_details"]["host"] > 0
            assert_dense_agrees(dense, PROMPTS[0], again)
            if ordered:
                for asked, reply in zip(PROMPTS, replies, strict=True):
                    now = log_probabilities(served.ask(asked, TOKENS, ASK))
                    assert now == pytest.approx(log_probabilities(reply), abs=SAME)
        if armed:
            assert served.cluster is not None
            state = report(served.cluster)
            assert state["exposures"] == state["landed"] == served.cluster.requests
            assert state["held_tokens"] == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Options(cp=2, spec=True), id="2 ranks, drafts"),
        pytest.param(Options(cp=4), id="4 ranks", marks=pytest.mark.long),
    ],
)
def test_context_parallel_prefill_answers_as_the_dense_model(
    new: Environment, dense: Any, tmp_path: Path, options: Options
) -> None:
    with resting(options, new, tmp_path) as served:
        for asked in PROMPTS:
            assert_dense_agrees(dense, asked, served.ask(asked, TOKENS, ASK))


def off_after_load_back(
    new: Environment, dense: Any, run_dir: Path, options: Options
) -> list[float]:
    """How far the log-probabilities of four prompts are from themselves after a load-back."""
    env = {**SLOW_LOADS, **options.env}
    flags = (*options.flags, *SMALL_HOST)
    options = replace(options, hicache=True, tokens=SMALL, flags=flags, env=env)
    asked = [prompt(360, seed=seed) for seed in range(4)]
    with resting(options, new, run_dir) as served:
        first = [served.ask(ids, 4, ASK) for ids in asked]
        second = [served.ask(ids, 4, ASK) for ids in asked]
    for ids, reply in zip(asked, first, strict=True):
        assert_dense_agrees(dense, ids, reply)
    assert all(reply.prefill["cached_tokens_details"]["host"] > 0 for reply in second)
    return [
        max(abs(a - b) for a, b in zip(*map(log_probabilities, pair), strict=True))
        for pair in zip(first, second, strict=True)
    ]


def test_control_without_the_index_k_wait_a_load_back_corrupts(
    new: Environment, dense: Any, tmp_path: Path
) -> None:
    forget = Options(env={runtime.FORGET: forgetful.INDEX_WAIT})
    assert max(off_after_load_back(new, dense, tmp_path, forget)) > SAME


@pytest.mark.long
def test_control_stock_sends_layers_of_a_split_that_are_not_loaded(
    new: Environment, dense: Any, tmp_path: Path
) -> None:
    """Stock 0.5.16 to 0.5.23: the next layer is broadcast without waiting for its load."""
    assert max(off_after_load_back(new, dense, tmp_path, SPLIT)) > SAME


@pytest.mark.long
def test_a_split_layer_is_sent_once_it_is_loaded(
    new: Environment, dense: Any, tmp_path: Path
) -> None:
    armed = replace(SPLIT, flags=ORDERED)
    assert max(off_after_load_back(new, dense, tmp_path, armed)) < SAME


PROMPTS_OF_A_KIND = {"noise": 1, "zero": 1, "mixed": 3}
"""Rows in another order are made good by copying, one time in two: one prompt of three will do."""


def test_corrupting_kv_collapses_the_accept_length(new: Environment, tmp_path: Path) -> None:
    options = Options(spec=True, env={runtime.CORRUPT: "1"})
    with resting(options, new, tmp_path) as served:
        for kind in corrupt.KINDS:
            shares = []
            for seed in range(PROMPTS_OF_A_KIND[kind]):
                # A prompt each, and the clean request first: stock keeps corrupted KV for the next.
                asked = prompt(240, seed=150 + 3 * seed + corrupt.KINDS.index(kind))
                clean = served.ask(asked, 96)
                broken = served.ask(asked, 96, {"rid": f"corrupt:{kind}:1.0:0:{seed}"})
                lengths = [reply.meta["spec_accept_length"] for reply in (clean, broken)]
                assert lengths[0] > 2.0, kind
                assert broken.ids != clean.ids, kind
                shares.append(lengths[1] / lengths[0])
            assert min(shares) < 0.5, (kind, shares)
