"""Which rules this server's model is judged by, and what it cannot be guarded with."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.specguard.detector import Rules

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config

FLAG = "--spec-guard-overrides"
NAME = "spec-guard"


def rules(config: Config, server_args: Any) -> Rules:
    """The thresholds for this server's model; ConfigError for an unusable overrides file."""
    found = Rules(
        config.guard_after,
        config.guard_min_length,
        config.guard_max_rate,
        config.guard_window,
        config.guard_repetition,
    )
    if algorithm(server_args) == "NGRAM" and found.min_length == Rules.min_length:
        # N-grams of the prompt draft nothing for new text: a low accept length is the rule there.
        found = replace(found, min_length=1.0)
    if not config.guard_overrides:
        return found
    model = getattr(server_args, "served_model_name", None) or server_args.model_path
    for pattern, values in _read(Path(config.guard_overrides)).items():
        if fnmatch.fnmatchcase(str(model), pattern):
            found = replace(found, **values)
    return found


_SMALLEST = {"after": 1, "min_length": 1.0, "max_rate": 0.0, "window": 0, "repetition": 0.0}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{FLAG}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(read, dict) or not all(isinstance(v, dict) for v in read.values()):
        raise ConfigError(f'{FLAG}: {path} must look like {{"PATTERN": {{"min_length": 1.3}}}}')
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Rules)}
    for pattern, values in read.items():
        for key, value in values.items():
            if key not in kinds:
                raise ConfigError(
                    f"{FLAG}: {path}, {pattern!r}: unknown key {key!r}; choose from "
                    f"{', '.join(kinds)}"
                )
            number = isinstance(value, int | float) and not isinstance(value, bool)
            whole = kinds[key] is float or isinstance(value, int)
            if not (number and whole and value >= _SMALLEST[key]):
                raise ConfigError(
                    f"{FLAG}: {path}, {pattern!r}: {key} {value!r} is not a "
                    f"{'number' if kinds[key] is float else 'whole number'} of at least "
                    f"{_SMALLEST[key]:g}"
                )
    return read


def algorithm(server_args: Any) -> str | None:
    """The speculative algorithm's name, None without one."""
    name = getattr(server_args, "speculative_algorithm", None)
    return None if not name else str(name).upper()


def depth(server_args: Any) -> int:
    """How many drafts one verification can accept: the longest path of the tree of drafts.

    EAGLE, MTP and STANDALONE draft `speculative_num_steps` levels, with top-k > 1 as a tree whose
    other branches can never be accepted together. NGRAM and the block drafters have a chain of
    all their draft tokens but the last verified one.
    """
    steps = getattr(server_args, "speculative_num_steps", None)
    if steps and algorithm(server_args) != "NGRAM":
        return int(steps)
    return max(int(getattr(server_args, "speculative_num_draft_tokens", None) or 2) - 1, 1)


def check(server_args: Any, config: Config) -> None:
    """Raise `ConfigError` where the guard was asked for and could not keep its word."""
    role = getattr(server_args, "disaggregation_mode", "null")
    rules(config, server_args)
    if algorithm(server_args) is None and NAME in config.named and role != "prefill":
        raise ConfigError(
            "speculative decoding is off, so there is nothing to judge by; add "
            "--speculative-algorithm, or start without spec-guard"
        )
    if config.guard != "abort":
        return
    for flag, problem in (
        ("--enable-streaming-session", "a session keeps its KV beyond an aborted request"),
        ("--enable-lmcache", "its store cannot be kept from returning the request's KV"),
        ("--enable-flexkv", "its store cannot be kept from returning the request's KV"),
    ):
        if getattr(server_args, flag.removeprefix("--").replace("-", "_"), False):
            raise ConfigError(
                f"--spec-guard abort with {flag}: {problem}; use --spec-guard observe"
            )
    if (getattr(server_args, "pp_size", 1) or 1) > 1:
        raise ConfigError(
            "--spec-guard abort with --pp-size above 1: the stages would end a request in "
            "different steps; use --spec-guard observe"
        )
    if role == "prefill" and (getattr(server_args, "tokenizer_worker_num", 1) or 1) > 1:
        raise ConfigError(
            "--spec-guard abort on a prefill server with --tokenizer-worker-num above 1: decode "
            "could not tell it whose KV is corrupt; use one tokenizer worker"
        )
