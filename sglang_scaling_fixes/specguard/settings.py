"""Which rules this server's model is judged by, and what it cannot be guarded with."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sglang_scaling_fixes import http, machine
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.resolved_args import resolved
from sglang_scaling_fixes.specguard.detector import SETS, Rules
from sglang_scaling_fixes.specguard.points import NAME
from sglang_scaling_fixes.vouch import read_secret

FLAG = "--spec-guard-overrides"
SECRET_FLAG = "--spec-guard-secret-file"
SIMULATED = "SGLANG_SIMULATE_ACC_LEN"
"""Stock's variable: above 0, it accepts so many tokens whatever was drafted."""
THRESHOLDS = {
    "after": "guard_after",
    "min_length": "guard_min_length",
    "max_rate": "guard_max_rate",
    "window": "guard_window",
    "repetition": "guard_repetition",
}
"""Of `Rules`, and the fields of `Config` that set them."""


def rules(config: Config, server_args: Any) -> Rules:
    """The thresholds for this server's model; ConfigError for an unusable overrides file."""
    found = SETS[config.guard_rules]
    given = {
        name: getattr(config, field)
        for name, field in THRESHOLDS.items()
        if getattr(config, field) != getattr(Config, field)
    }
    if given and config.guard_rules == "published":
        flag = THRESHOLDS[next(iter(given))].replace("guard", "--spec-guard").replace("_", "-")
        raise ConfigError(
            f"{flag} with --spec-guard-rules published, whose thresholds are fixed; drop one of "
            "the two"
        )
    found = replace(found, **given)
    if algorithm(server_args) == "NGRAM" and found.min_length == Rules.min_length:
        # N-grams of the prompt draft nothing for new text: a low accept length is the rule there.
        found = replace(found, min_length=1.0)
    if not config.guard_overrides:
        return found
    model = resolved(server_args, "served_model_name") or server_args.model_path
    for pattern, values in _read(Path(config.guard_overrides)).items():
        if fnmatch.fnmatchcase(str(model), pattern):
            found = replace(found, **values)
    return found


_SMALLEST = {
    "after": 1,
    "min_length": 1.0,
    "max_rate": 0.0,
    "window": 0,
    "repetition": 0.0,
    "persistence": 0,
}


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
    name = resolved(server_args, "speculative_algorithm")
    return None if not name else str(name).upper()


def simulated() -> bool:
    """Whether stock makes up what it accepts."""
    with contextlib.suppress(ValueError):
        return float(machine.here.env.get(SIMULATED) or -1) > 0
    return False


def why_simulated() -> str:
    value = machine.here.env[SIMULATED]
    return f"acceptance is simulated ({SIMULATED}={value}), so it says nothing of the KV cache"


def judges(server_args: Any) -> bool:
    """Whether acceptance on this server says anything."""
    return algorithm(server_args) is not None and not simulated()


def secret(config: Config) -> bytes | None:
    """What is shared with the retry proxy and with the other servers of a pair."""
    if not config.guard_secret_file:
        return None
    return read_secret(SECRET_FLAG, config.guard_secret_file)


def depth(server_args: Any) -> int:
    """How many drafts one verification can accept: the longest path of the tree of drafts.

    With top-k above 1 EAGLE, MTP and STANDALONE draft a tree of `speculative_num_steps` levels,
    whose branches can never be accepted together. A chain (also NGRAM's, and the block drafters',
    whose step count is 1) is all the draft tokens but the one that is no draft.
    """
    topk = resolved(server_args, "speculative_eagle_topk") or 1
    steps = resolved(server_args, "speculative_num_steps")
    if topk > 1 and steps and algorithm(server_args) != "NGRAM":
        return int(steps)
    drafted = resolved(server_args, "speculative_num_draft_tokens")
    if not drafted:
        raise ConfigError(
            "--speculative-num-draft-tokens is not known, and without it no accept rate; give it"
        )
    return max(int(drafted) - 1, 1)


def check(server_args: Any, config: Config) -> None:
    """Raise `ConfigError` where the guard was asked for and could not keep its word."""
    role = resolved(server_args, "disaggregation_mode") or "null"
    rules(config, server_args)
    secret(config)
    if simulated() and NAME in config.named and role != "prefill":
        raise ConfigError(f"{why_simulated()}; unset it, or start without spec-guard")
    if algorithm(server_args) is None and NAME in config.named and role != "prefill":
        raise ConfigError(
            "speculative decoding is off, so there is nothing to judge by; add "
            "--speculative-algorithm, or start without spec-guard"
        )
    if config.guard != "abort":
        return

    def refuse(flag: str, why: str) -> None:
        raise ConfigError(f"--spec-guard abort with {flag}: {why}; use --spec-guard observe")

    for field, why in (
        ("enable_streaming_session", "a session keeps its KV beyond an aborted request"),
        ("enable_lmcache", "its store cannot be kept from returning the request's KV"),
        ("enable_flexkv", "its store cannot be kept from returning the request's KV"),
    ):
        if resolved(server_args, field):
            refuse("--" + field.replace("_", "-"), why)
    if (resolved(server_args, "pp_size") or 1) > 1:
        refuse("--pp-size above 1", "the stages would end a request in different steps")
    if elsewhere := http.spoken_elsewhere(resolved(server_args, "tokenizer_worker_num")):
        refuse(elsewhere, "plugins are not loaded where HTTP is spoken then")
    if resolved(server_args, "hicache_host_memory_mode") == "buffer_only":
        refuse(
            "--hicache-host-memory-mode buffer_only",
            "a request that waits for staged KV cannot be kept from it",
        )
    if not resolved(server_args, "hicache_storage_backend"):
        return
    if (resolved(server_args, "dp_size") or 1) > 1:
        refuse(
            "--dp-size above 1 and --hicache-storage-backend",
            "the ranks share a store and do not know of each other's anomalies",
        )
    if role == "decode" and not storage_is_namespaced():
        refuse(
            "--hicache-storage-backend on a decode server of this release",
            "it stores by tokens alone, so a later request cannot be kept from suspect pages",
        )


def storage_is_namespaced() -> bool:
    """Whether keys of the storage tier depend on a request's namespace (since 0.5.20)."""
    try:
        return hasattr(
            importlib.import_module("sglang.srt.mem_cache.utils"), "storage_namespace_seed"
        )
    except ImportError:
        return False
