"""Which rules a server's model is judged by, and which servers cannot be guarded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes import machine
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.specguard import FIX, attach, settings
from sglang_scaling_fixes.specguard.detector import SETS, Rules
from sglang_scaling_fixes.specguard.guard import depth_of

SECRET = b"a secret that both of them know"


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
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
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


def test_the_published_rules_are_exactly_those() -> None:
    published = Rules(after=128, min_length=1.4, max_rate=0.96, window=0, repetition=0.0)
    assert SETS["published"] == published
    assert settings.rules(Config(guard_rules="published"), server()) == published
    assert settings.rules(Config(guard_rules="persistent"), server()).persistence > 0
    assert settings.rules(Config(guard_rules="persistent", guard_after=64), server()).after == 64
    with pytest.raises(ConfigError, match="--spec-guard-window with --spec-guard-rules published"):
        settings.rules(Config(guard_rules="published", guard_window=64), server())


def test_a_secret_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    assert settings.secret(Config()) is None
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="--spec-guard-secret-file"):
        settings.check(server(), Config(guard_secret_file=str(file)))
    file.write_bytes(SECRET + b"\n")
    assert settings.secret(Config(guard_secret_file=str(file))) == SECRET


def test_where_acceptance_is_simulated_there_is_nothing_to_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = SimpleNamespace(env={settings.SIMULATED: "2.5"})
    monkeypatch.setattr(machine, "here", here)
    named = Config(fixes=("spec-guard",), named=("spec-guard",))
    with pytest.raises(ConfigError, match=f"simulated \\({settings.SIMULATED}=2.5\\)"):
        settings.check(server(), named)
    settings.check(server(disaggregation_mode="prefill"), named)  # decode judges, and says so
    settings.check(server(), Config(fixes=("spec-guard",)))  # a bare --plugin
    assert not settings.judges(server())
    for value in ("-1", "0", "", "x"):  # the control
        here.env[settings.SIMULATED] = value
        assert settings.judges(server())
        settings.check(server(), named)


def test_ngrams_are_not_judged_by_a_low_accept_length_unless_asked() -> None:
    assert settings.rules(Config(), server(speculative_algorithm="NGRAM")).min_length == 1.0
    asked = Config(guard_min_length=1.1)
    assert settings.rules(asked, server(speculative_algorithm="NGRAM")).min_length == 1.1


def test_a_bare_plugin_says_why_it_guards_nothing_where_acceptance_is_simulated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "here", SimpleNamespace(env={settings.SIMULATED: "3"}))
    monkeypatch.setattr(attach, "nothing_to_judge", None)
    assert FIX.report() is None
    attach.bind(SimpleNamespace(), server(), Config(fixes=("spec-guard",)))
    report = FIX.report()
    assert report is not None and report["spec_guard"]["action"] == "none"
    assert f"{settings.SIMULATED}=3" in report["spec_guard"]["reason"]
    assert "spec-guard is inactive" in caplog.text
    monkeypatch.setattr(attach, "nothing_to_judge", None)
    attach.bind(
        SimpleNamespace(), server(speculative_algorithm=None), Config(fixes=("spec-guard",))
    )
    assert FIX.report() is None  # the control: nobody expects anything there


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
