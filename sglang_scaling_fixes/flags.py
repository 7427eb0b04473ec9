"""Command-line flags and environment: two spellings of one `Config`.

Flags are written into the environment once they are parsed, because that is what
reaches every child process SGLang spawns; a process therefore always reads its
configuration from the environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, cast

from sglang_scaling_fixes.config import PLUGIN_ENV, PLUGIN_FLAG, Config, Setting
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.fixes import DEFAULT_FIXES, FIX_NAMES, FIXES, SETTINGS

ENTRY = "scaling_fixes"
"""The name of our entry point, as SGLANG_PLUGINS takes it."""
FILTER_ENV = "SGLANG_PLUGINS"
"""Stock's own variable: the only plugins to load, by name; all where it is unset or empty."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def from_env(env: Mapping[str, str] = os.environ) -> Config:
    """Read the environment. Raises `ConfigError` naming variable, value and remedy."""
    text = env.get(PLUGIN_ENV)
    fixes = None if text is None else parse_fixes(text, f"{PLUGIN_FLAG} ({PLUGIN_ENV})")
    values = {setting.field: _read(setting, env.get(setting.env)) for setting in SETTINGS}
    named = () if text is None or text.strip() == "default" else fixes or ()
    for fix in FIXES:
        for setting in fix.settings:
            if not setting.arms or env.get(setting.env) is None:
                continue
            if text is not None and not fixes:
                raise ConfigError(
                    f"{setting.flag} ({setting.env}) with {PLUGIN_FLAG} none; drop one of the two"
                )
            fixes = tuple(dict.fromkeys([*(fixes or ()), fix.name]))
            named = tuple(dict.fromkeys([*named, fix.name]))
    return Config(fixes, named=named, **cast(Any, values))


def by_name(names: Sequence[str], env: Mapping[str, str] = os.environ) -> Config | None:
    """What `--plugin` with these names asks for here; None where that is not just what they name.

    A setting arms its fix as well.
    """
    try:
        config = from_env({**env, PLUGIN_ENV: ",".join(names) or "none"})
    except ConfigError:
        return None
    return config if config.fixes == tuple(names) else None


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
