"""What a process was asked to do, and how one setting of that is written.

`flags.py` reads it from flags and from the environment.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ENV_PREFIX = "SGLANG_SCALING_FIXES_"
PLUGIN_ENV = ENV_PREFIX + "PLUGIN"
PLUGIN_FLAG = "--plugin"


@dataclass(frozen=True)
class Config:
    """What this process was asked to do.

    `fixes` is None when nobody asked for anything (stock stays untouched), an
    empty tuple for an explicit `none`. Every other field but `named` is the value
    of one `Setting`, which names it.
    """

    fixes: tuple[str, ...] | None = None
    peer: str = "hold"
    audit: bool = False
    resend: float = 0.1
    max_held: float = 0.5
    fence: str = "auto"
    layer_split_scratch: int = 0
    guard: str = "observe"
    guard_rules: str = "windowed"
    guard_secret_file: str = ""
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


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


@dataclass(frozen=True)
class Setting:
    """One setting of a fix: its flag, its environment variable, and how its value is read."""

    flag: str
    field: str
    """The field of `Config` that holds its value. Default and type are that field's."""
    help: str
    choices: tuple[str, ...] = ()
    low: float = 0.01
    high: float = 60.0
    unit: str = "number of seconds"
    """Of a number: its bounds, and what it counts."""
    metavar: str = "NUMBER"
    arms: bool = False
    """Giving it asks for its fix, if nothing else does."""

    @property
    def default(self) -> object:
        return _DEFAULTS[self.field]

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()

    @property
    def dest(self) -> str:
        return self.env.lower()
