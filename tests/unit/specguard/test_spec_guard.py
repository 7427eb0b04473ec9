"""The guard on requests with stock's fields: what it does to whom, and what it refuses."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.specguard import settings
from sglang_scaling_fixes.specguard.detector import Rules
from sglang_scaling_fixes.specguard.guard import (
    DraftCounters,
    SpecGuard,
    depth_of,
    holds_kv,
    tainted,
)
from sglang_scaling_fixes.specguard.reporting import Reporting
from sglang_scaling_fixes.specguard.taint import Taint

PROMPT = list(range(20))


class Request:
    """The fields of a stock request that the guard knows."""

    def __init__(self, prompt: list[int], extra_key: str | None = None) -> None:
        self.rid = "r1"
        self.origin_input_ids = self.origin_input_ids_unpadded = prompt
        self.output_ids: list[int] = []
        self.spec_verify_ct = 0
        self.accepted = 0
        self.finished_reason = None
        self.to_finish: Any = None
        self.skip_radix_cache_insert = False
        self.extra_key = extra_key
        self.kv = SimpleNamespace(req_pool_idx=None)
        self.bootstrap_room = 77


def guard(action: str = "abort", **more: Any) -> SpecGuard:
    drafts = DraftCounters(3, "accepted")
    return SpecGuard(Rules(), action, Taint(4), drafts, Reporting(**more))


def verify(guard: SpecGuard, req: Request, accepted: int, times: int = 400) -> None:
    for _ in range(times):
        req.spec_verify_ct += 1
        req.accepted += accepted
        req.output_ids += [7] * (accepted + 1)
        guard.inspect(req)


def test_abort_ends_the_request_and_makes_its_prompt_suspect() -> None:
    notified: list[Any] = []
    watch = guard(notify=lambda req, tokens: notified.append((req, tokens[:20])))
    req = Request(PROMPT)
    verify(watch, req, 0)
    assert req.to_finish.status_code.name == "SERVICE_UNAVAILABLE"
    assert req.to_finish.err_type == "kv_anomaly"
    assert req.skip_radix_cache_insert and tainted(req)
    assert notified == [(req, PROMPT)]
    later = Request(PROMPT)
    watch.choose_namespace(later)
    assert later.extra_key == "|kv-anomaly-0-1"
    assert watch.report()["anomalies"] == {"low_accept_length/aborted": 1}


def test_observe_counts_and_changes_nothing() -> None:
    watch = guard("observe")
    req = Request(PROMPT)
    before = {**vars(req)}
    verify(watch, req, 0)
    for field in ("to_finish", "skip_radix_cache_insert", "extra_key", "finished_reason"):
        assert getattr(req, field) == before[field]
    assert not tainted(req)
    assert watch.report()["anomalies"] == {"low_accept_length/observed": 1}


def test_a_request_that_is_ending_anyway_ends_that_way_and_is_suspect_all_the_same() -> None:
    """A client's abort in the same step: stock would insert its KV."""
    watch = guard()
    req = Request(PROMPT)
    req.to_finish = ending = object()
    verify(watch, req, 0)
    assert req.to_finish is ending
    assert req.skip_radix_cache_insert and tainted(req)
    assert watch.taint.namespace(PROMPT) is not None


def test_a_short_prompt_is_known_by_what_it_generated() -> None:
    """Retracted, it computes prompt and output again, and both are cached as one prefix."""
    watch = guard()
    req = Request([1, 2])
    verify(watch, req, 0)
    later = Request([1, 2, 7, 7, 99])  # the next turn of the same conversation
    watch.choose_namespace(later)
    assert later.extra_key is not None
    other = Request([1, 2, 8, 8, 99])
    watch.choose_namespace(other)
    assert other.extra_key is None


def test_a_prompt_with_placeholders_is_known_with_and_without_them() -> None:
    watch = guard()
    req = Request(PROMPT)
    req.origin_input_ids = [900, 901, 902, 903, *PROMPT]
    verify(watch, req, 0)
    later = Request([5] * 20)
    later.origin_input_ids = [900, 901, 902, 903, 1]
    watch.choose_namespace(later)
    assert later.extra_key is not None


def test_observing_a_prefill_that_is_notified_changes_nothing() -> None:
    watch = guard("observe")
    watch.notified({4: 1})
    assert len(watch.taint) == 0
    assert watch.report()["notifications_received"] == 1


def test_a_namespace_of_the_users_own_is_kept() -> None:
    watch = guard()
    watch.taint.add(PROMPT)
    req = Request(PROMPT, extra_key="tenant")
    watch.choose_namespace(req)
    assert req.extra_key == "tenant|kv-anomaly-0-1"
    req.extra_key += "|elastic"  # stock adds one of its own, later
    watch.taint.add(PROMPT)
    watch.choose_namespace(req)
    assert req.extra_key == "tenant|elastic|kv-anomaly-0-2"


def test_a_request_that_holds_kv_is_not_moved() -> None:
    """Its pages are locked in the old namespace; it is watched like any other."""
    watch = guard()
    req = Request(PROMPT)
    req.kv.req_pool_idx = 5
    watch.taint.add(PROMPT)
    watch.choose_namespace(req)
    assert req.extra_key is None
    req.kv.req_pool_idx = None  # retracted: it begins anew
    watch.choose_namespace(req)
    assert req.extra_key == "|kv-anomaly-0-1"


@pytest.mark.parametrize(
    ("req", "held"),
    [
        (SimpleNamespace(req_pool_idx=None), False),
        (SimpleNamespace(req_pool_idx=0), True),
        (SimpleNamespace(kv=SimpleNamespace(req_pool_idx=-1)), False),
        (SimpleNamespace(kv=SimpleNamespace(req_pool_idx=0)), True),
        (SimpleNamespace(kv=None), False),
    ],
)
def test_where_releases_keep_a_requests_row(req: Any, held: bool) -> None:
    assert holds_kv(req) == held


def test_the_log_line_is_json_with_what_an_operator_needs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = guard(worker="10.0.0.1:30000")
    with caplog.at_level(logging.WARNING):
        verify(watch, Request(PROMPT), 0)
    (message,) = (record.getMessage() for record in caplog.records)
    said = json.loads(message.removeprefix("sglang-scaling-fixes: "))
    assert said["rid"] == "r1" and said["room"] == 77 and said["worker"] == "10.0.0.1:30000"
    assert (said["kind"], said["action"], said["tokens"]) == ("low_accept_length", "aborted", 128)
    assert said["verifications"] == 128 and said["accepted"] == 0


def test_other_ranks_act_alike_and_stay_silent(caplog: pytest.LogCaptureFixture) -> None:
    notified: list[Any] = []
    watch = guard(is_reporting_rank=False, notify=lambda *args: notified.append(args))
    req = Request(PROMPT)
    verify(watch, req, 0)
    assert req.to_finish is not None and len(watch.taint) == 1
    assert not caplog.records and not notified
    assert watch.report()["requests"] == 0


# -- settings ------------------------------------------------------------------------------


def server(**more: Any) -> Any:
    args = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
        "model_path": "/models/GLM-5.1-FP8",
        "served_model_name": "glm-5.1",
    }
    return SimpleNamespace(**{**args, **more})


@pytest.mark.parametrize(
    ("args", "depth"),
    [
        ({}, 3),
        ({"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 16}, 3),
        ({"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 12}, 11),
        (
            {
                "speculative_algorithm": "DFLASH",
                "speculative_num_steps": 1,  # as stock sets it
                "speculative_num_draft_tokens": 16,
            },
            15,
        ),
    ],
)
def test_the_depth_that_can_be_accepted(args: dict[str, Any], depth: int) -> None:
    assert settings.depth(server(**args)) == depth


def test_a_depth_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--speculative-num-draft-tokens"):
        settings.depth(server(speculative_num_steps=None, speculative_num_draft_tokens=None))


def test_what_stock_made_of_the_arguments_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 0.5.19 they stay as the operator gave them."""
    made = SimpleNamespace(speculative_num_draft_tokens=4, speculative_eagle_topk=1)
    context = SimpleNamespace(get_spec=lambda: made)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)  # type: ignore[arg-type]
    given = server(speculative_num_steps=None, speculative_num_draft_tokens=None)
    assert settings.depth(given) == 3


def test_an_adaptive_workers_depth_is_read_each_time() -> None:
    worker = SimpleNamespace(speculative_num_steps=3)
    depth = depth_of(SimpleNamespace(draft_worker=worker), server(speculative_adaptive=True))
    assert callable(depth) and depth() == 3
    worker.speculative_num_steps = 0
    assert depth() == 0


def test_a_model_may_have_rules_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text('{"*": {"window": 64}, "glm-*": {"min_length": 1.2, "after": 200}}')
    config = Config(fixes=("spec-guard",), guard_overrides=str(file))
    assert settings.rules(config, server()) == Rules(after=200, min_length=1.2, window=64)
    assert settings.rules(config, server(served_model_name="qwen")) == Rules(window=64)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", "must look like"),
        ('{"x": 1}', "must look like"),
        ('{"x": {"min_len": 1}}', "unknown key 'min_len'"),
        ('{"x": {"after": 1.5}}', "not a whole number"),
        ('{"x": {"min_length": 0.5}}', "at least 1"),
        ('{"x": {"window": true}}', "not a whole number"),
    ],
)
def test_a_bad_overrides_file_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "rules.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--spec-guard-overrides") as error:
        settings.rules(Config(guard_overrides=str(file)), server())
    assert says in str(error.value) and str(file) in str(error.value)


def test_ngrams_are_not_judged_by_a_low_accept_length_unless_asked() -> None:
    assert settings.rules(Config(), server(speculative_algorithm="NGRAM")).min_length == 1.0
    asked = Config(guard_min_length=1.1)
    assert settings.rules(asked, server(speculative_algorithm="NGRAM")).min_length == 1.1


ABORT = Config(fixes=("spec-guard",), guard="abort", named=("spec-guard",))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"speculative_algorithm": None}, "--speculative-algorithm"),
        ({"enable_streaming_session": True}, "--enable-streaming-session"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"enable_flexkv": True}, "--enable-flexkv"),
        ({"pp_size": 2}, "--pp-size"),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
        ({"hicache_host_memory_mode": "buffer_only"}, "buffer_only"),
        ({"hicache_storage_backend": "file", "dp_size": 2}, "--dp-size"),
    ],
)
def test_what_cannot_be_guarded_is_refused(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings.check(server(**args), ABORT)


def test_what_can_be_guarded_is_not_refused() -> None:
    settings.check(server(), ABORT)
    settings.check(server(disaggregation_mode="decode"), ABORT)
    settings.check(server(hicache_storage_backend="file"), ABORT)
    settings.check(server(disaggregation_mode="prefill", speculative_algorithm=None), ABORT)
    settings.check(server(pp_size=2), Config(fixes=("spec-guard",)))
    # A bare --plugin on a server without speculation: nothing to judge, nothing refused.
    settings.check(server(speculative_algorithm=None), Config(fixes=("safe-reclaim", "spec-guard")))
