"""Flags and environment: two spellings of one configuration, with errors a user can act on."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from pathlib import Path

import pytest

from sglang_scaling_fixes import config, fixes, flags
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import ConfigError


def parse(*argv: str) -> Config:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    flags.add_flags(parser)
    env: dict[str, str] = {}
    flags.flags_to_env(parser.parse_args(argv), env)
    return flags.from_env(env)


def test_nothing_asked_is_not_the_same_as_none_asked() -> None:
    assert parse().fixes is None
    assert parse("--plugin", "none").fixes == ()
    assert not parse().armed
    assert not parse("--plugin", "none").armed


def test_bare_plugin_arms_the_safe_defaults_and_leaves_the_next_flag_alone() -> None:
    assert parse("--plugin", "--model-path", "x").fixes == fixes.DEFAULT_FIXES
    assert parse("--plugin").fixes == fixes.DEFAULT_FIXES


def test_named_fixes_keep_their_order_once() -> None:
    assert parse("--plugin", "spec-guard,safe-reclaim,spec-guard").fixes == (
        "spec-guard",
        "safe-reclaim",
    )


@pytest.mark.parametrize("setting", fixes.SETTINGS, ids=lambda s: s.flag)
def test_every_setting_has_both_spellings(setting: config.Setting) -> None:
    other = {
        bool: "1",
        int: "64",
        float: str((setting.low + setting.high) / 2),
        str: setting.choices[-1] if setting.choices else "some.json",
    }
    value = other[setting.kind]
    argv = [setting.flag] if setting.kind is bool else [setting.flag, value]
    assert setting.env.startswith(config.ENV_PREFIX)
    assert parse(*argv) == flags.from_env({setting.env: value}) != Config()


def test_an_action_of_the_guard_arms_it() -> None:
    assert parse("--spec-guard", "abort").fixes == ("spec-guard",)
    both = parse("--plugin", "--spec-guard", "abort")
    assert both.fixes == fixes.DEFAULT_FIXES
    assert both.named == ("spec-guard",)
    assert parse("--plugin", "hicache-ordering", "--spec-guard", "observe").fixes == (
        "hicache-ordering",
        "spec-guard",
    )
    with pytest.raises(ConfigError, match=r"--spec-guard .*none"):
        parse("--plugin", "none", "--spec-guard", "abort")


def test_a_bare_plugin_asks_for_nothing_by_name() -> None:
    assert parse("--plugin").named == ()
    assert parse("--plugin", "spec-guard").named == ("spec-guard",)


def test_a_flag_wins_over_a_variable() -> None:
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    env = {config.PLUGIN_ENV: "none"}
    flags.flags_to_env(parser.parse_args(["--plugin", "safe-reclaim"]), env)
    assert flags.from_env(env).fixes == ("safe-reclaim",)


@pytest.mark.parametrize(
    ("env", "names"),
    [
        ({config.PLUGIN_ENV: "safe-reclam"}, ["PLUGIN", "'safe-reclam'", "safe-reclaim"]),
        ({config.PLUGIN_ENV: "none,safe-reclaim"}, ["'none'"]),
        ({config.ENV_PREFIX + "SAFE_RECLAIM_PEER": "trust"}, ["--safe-reclaim-peer", "'trust'"]),
        ({config.ENV_PREFIX + "SAFE_RECLAIM_AUDIT": "maybe"}, ["AUDIT", "'maybe'", "1 or 0"]),
        ({config.ENV_PREFIX + "SAFE_RECLAIM_RESEND": "0"}, ["--safe-reclaim-resend", "'0'"]),
        ({config.ENV_PREFIX + "SAFE_RECLAIM_RESEND": "nan"}, ["'nan'"]),
        ({config.ENV_PREFIX + "SAFE_RECLAIM_RESEND": "soon"}, ["'soon'", "0.01 to 60"]),
        (
            {config.ENV_PREFIX + "SAFE_RECLAIM_MAX_HELD": "5"},
            ["--safe-reclaim-max-held", "'5'", "share of the pool from 0.001 to 1"],
        ),
    ],
)
def test_bad_values_name_flag_value_and_remedy(env: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        flags.from_env(env)
    assert "\n" not in str(caught.value)
    for name in names:
        assert name in str(caught.value)


def test_the_name_in_the_filter_is_that_of_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]["sglang.srt.plugins"]) == [flags.ENTRY]


def test_every_field_is_the_value_of_one_setting() -> None:
    values = {field.name for field in dataclasses.fields(Config)} - {"fixes", "named"}
    assert sorted(setting.field for setting in fixes.SETTINGS) == sorted(values)
