"""One frozen configuration. Command-line flags and environment are two spellings of it.

Flags are written into the environment once they are parsed, because that is what
reaches every child process SGLang spawns; a process therefore always reads its
configuration from the environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, cast

from sglang_scaling_fixes.errors import ConfigError

FIX_NAMES = ("safe-reclaim", "hicache-ordering", "layer-split", "spec-guard")
"""Every fix of the project, in the order it is reported."""

DEFAULT_FIXES = ("safe-reclaim", "spec-guard")
"""What a bare `--plugin` arms: fixes that are safe without a decision by the operator."""

ENV_PREFIX = "SGLANG_SCALING_FIXES_"
PLUGIN_ENV = ENV_PREFIX + "PLUGIN"
PLUGIN_FLAG = "--plugin"
GUARD_ENV = ENV_PREFIX + "SPEC_GUARD"

ENTRY = "scaling_fixes"
"""The name of our entry point, as SGLANG_PLUGINS takes it."""
FILTER_ENV = "SGLANG_PLUGINS"
"""Stock's own variable: the only plugins to load, by name; all where it is unset or empty."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}

PEER_POLICIES = ("hold", "require", "stock-ack")
GUARD_ACTIONS = ("observe", "abort")


@dataclass(frozen=True)
class Setting:
    """One setting: its flag, its environment variable, and how its value is read."""

    flag: str
    help: str
    kind: type
    default: object
    choices: tuple[str, ...] = ()
    low: float = 0.01
    high: float = 60.0
    unit: str = "number of seconds"
    """Of a number: its bounds, and what it counts."""
    metavar: str = "NUMBER"

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()

    @property
    def dest(self) -> str:
        return self.env.lower()


# In the order of Config's fields after `fixes`.
SETTINGS = (
    Setting(
        "--safe-reclaim-peer",
        "What decode does with a prefill that runs without safe-reclaim. hold: serve, and "
        "after an abort hold the KV slots until stock's success message proves the write "
        "landed. require: fail the request before any address is sent. stock-ack: like hold, "
        "and believe stock's own acknowledgement that the room has drained (0.5.19 and later).",
        str,
        "hold",
        PEER_POLICIES,
    ),
    Setting(
        "--safe-reclaim-audit",
        "Check every free on the decode side against all slots a prefill may still write. "
        "Costs a device sync per free; for tests and investigations.",
        bool,
        False,
    ),
    Setting(
        "--safe-reclaim-resend",
        "Seconds before an unanswered ABORT is sent again (doubles up to 5 s).",
        float,
        0.1,
    ),
    Setting(
        "--safe-reclaim-max-held",
        "Share of the KV pool that may be held for more than 5 s without proof. Past it decode "
        "answers new requests with 503 and Retry-After, and fences its memory if a prefill that "
        "could still write is gone, or --safe-reclaim-fence is given. 1: no limit.",
        float,
        0.05,
        low=0.001,
        high=1.0,
        unit="share of the pool",
    ),
    Setting(
        "--safe-reclaim-fence",
        "Past --safe-reclaim-max-held, fence whoever is to blame: decode replaces its receiving "
        "Mooncake engine, so that nothing sent before can land. Costs about a second and every "
        "transfer in flight to this decode.",
        bool,
        False,
    ),
    Setting(
        "--spec-guard",
        "What to do with a request whose speculative decoding betrays a corrupted KV cache. "
        "observe: count and log it. abort: end it with 503 (kv_anomaly), and let no later request "
        "read its KV. Arms spec-guard if --plugin does not name it.",
        str,
        "observe",
        GUARD_ACTIONS,
    ),
    Setting(
        "--spec-guard-after",
        "Generated tokens before a request is judged.",
        int,
        128,
        low=1,
        high=1_000_000,
        unit="whole number of tokens",
    ),
    Setting(
        "--spec-guard-min-length",
        "Accept length (tokens per verification) below which a request is anomalous. 1: never.",
        float,
        1.4,
        low=1.0,
        high=64.0,
        unit="number of tokens",
    ),
    Setting(
        "--spec-guard-max-rate",
        "Accept rate (accepted share of the drafts that could be accepted) above which a request "
        "that also repeats itself is anomalous. 1: never.",
        float,
        0.96,
        low=0.0,
        high=1.0,
        unit="share of drafts",
    ),
    Setting(
        "--spec-guard-window",
        "Tokens of the sliding window that is judged beside the whole request. 0: none.",
        int,
        256,
        low=0,
        high=65536,
        unit="whole number of tokens",
    ),
    Setting(
        "--spec-guard-repetition",
        "Share of the last 256 tokens' 8-grams that must have stood there before for "
        "--spec-guard-max-rate to count. 0: judge by the rate alone.",
        float,
        0.7,
        low=0.0,
        high=1.0,
        unit="share of n-grams",
    ),
    Setting(
        "--spec-guard-overrides",
        "JSON file with other thresholds for models whose name (--served-model-name, or else "
        '--model-path) matches a pattern: {"*GLM-5*": {"min_length": 1.3}}. The last match wins; '
        "keys: after, min_length, max_rate, window, repetition.",
        str,
        "",
        metavar="FILE",
    ),
)


@dataclass(frozen=True)
class Config:
    """What this process was asked to do.

    `fixes` is None when nobody asked for anything (stock stays untouched), an
    empty tuple for an explicit `none`.
    """

    fixes: tuple[str, ...] | None = None
    peer: str = "hold"
    audit: bool = False
    resend: float = 0.1
    max_held: float = 0.05
    fence: bool = False
    guard: str = "observe"
    guard_after: int = 128
    guard_min_length: float = 1.4
    guard_max_rate: float = 0.96
    guard_window: int = 256
    guard_repetition: float = 0.7
    guard_overrides: str = ""
    named: tuple[str, ...] = ()
    """Those of `fixes` that were asked for by name, and not by a bare `--plugin`."""

    @property
    def armed(self) -> bool:
        return bool(self.fixes)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read the environment. Raises `ConfigError` naming variable, value and remedy."""
        text = env.get(PLUGIN_ENV)
        fixes = None if text is None else parse_fixes(text, f"{PLUGIN_FLAG} ({PLUGIN_ENV})")
        names = [field.name for field in fields(cls)][1:-1]
        values = {n: _read(s, env.get(s.env)) for n, s in zip(names, SETTINGS, strict=True)}
        named = () if text is None or text.strip() == "default" else fixes or ()
        if env.get(GUARD_ENV) is not None:
            if text is not None and not fixes:
                raise ConfigError(
                    f"--spec-guard ({GUARD_ENV}) with {PLUGIN_FLAG} none; drop one of the two"
                )
            fixes = tuple(dict.fromkeys([*(fixes or ()), "spec-guard"]))
            named = tuple(dict.fromkeys([*named, "spec-guard"]))
        return cls(fixes, named=named, **cast(Any, values))


def left_out(env: Mapping[str, str] = os.environ, name: str = ENTRY) -> str | None:
    """Why SGLANG_PLUGINS keeps stock from loading the plugin `name`; None where it does not.

    Stock reads it as names with commas between them, and empty as unset.
    """
    value = env.get(FILTER_ENV, "")
    if not value or name in (part.strip() for part in value.split(",")):
        return None
    return f"{FILTER_ENV}={value} leaves this plugin out; add {name} to it, or unset it"


def parse_fixes(text: str, source: str) -> tuple[str, ...]:
    """`"default"`, `"none"` or a comma-separated list of fix names, without repeats.

    `source` is the flag or variable the text came from, for the error message.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if names in ((), ("none",)):
        return ()
    if names == ("default",):
        return DEFAULT_FIXES
    for name in names:
        if name not in FIX_NAMES:
            raise ConfigError(
                f"{source}: unknown fix {name!r}; choose from {', '.join(FIX_NAMES)}, "
                f"or give {PLUGIN_FLAG} alone for the defaults, or {PLUGIN_FLAG} none"
            )
    return names


def _read(setting: Setting, text: str | None) -> object:
    if text is None:
        return setting.default
    value = text.strip()
    if setting.kind is bool:
        if value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        raise ConfigError(f"{setting.env}: {text!r} is not a yes or no; use 1 or 0")
    if setting.kind in (float, int):
        try:
            number = setting.kind(value)
        except ValueError:
            number = -1
        if setting.low <= number <= setting.high:
            return number
        raise ConfigError(
            f"{setting.flag} ({setting.env}): {text!r} is not a {setting.unit} "
            f"from {setting.low:g} to {setting.high:g}"
        )
    if value in setting.choices or not setting.choices:
        return value
    raise ConfigError(
        f"{setting.flag} ({setting.env}): unknown value {text!r}; "
        f"choose from {', '.join(setting.choices)}"
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--plugin` and every setting to SGLang's own parser."""
    group = parser.add_argument_group("sglang-scaling-fixes")
    group.add_argument(
        PLUGIN_FLAG,
        dest=PLUGIN_ENV.lower(),
        nargs="?",
        const="default",
        default=None,
        metavar="FIX[,FIX...]",
        help="Arm sglang-scaling-fixes: alone, every fix that is safe by default "
        f"({', '.join(DEFAULT_FIXES)}); with names, those; none, nothing. "
        f"Known: {', '.join(FIX_NAMES)}. A fix asked for and not in force stops the start. "
        f"Environment: {PLUGIN_ENV}.",
    )
    for setting in SETTINGS:
        text = f"{setting.help} Default: {setting.default}. Environment: {setting.env}."
        if setting.kind is bool:
            group.add_argument(
                setting.flag, dest=setting.dest, action="store_const", const="1", help=text
            )
        else:
            metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.metavar
            group.add_argument(setting.flag, dest=setting.dest, metavar=metavar, help=text)


def flags_to_env(args: argparse.Namespace, env: MutableMapping[str, str] = os.environ) -> None:
    """Write the flags that were given into the environment; a flag wins over a variable."""
    for name in (PLUGIN_ENV, *(s.env for s in SETTINGS)):
        value = getattr(args, name.lower(), None)
        if value is not None:
            env[name] = str(value)
