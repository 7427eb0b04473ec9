"""`sglang-scaling-fixes doctor`: what a server of this environment would have in force.

A fresh process goes through stock's own plugin loader with the environment of this one, as a
server does when it starts. A fix counts as armed only if the loader called us and the fix was
attached and proven there, now or earlier with the same files and environment. Without a GPU
stock SGLang cannot be imported; then, and only then, the lab's stand-ins are used, and the
report says so.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_scaling_fixes import fixes, flags, loading, release
from sglang_scaling_fixes.config import PLUGIN_ENV, PLUGIN_FLAG, Config
from sglang_scaling_fixes.fixes import FixState
from sglang_scaling_fixes.patches import applied

Statuses = list[dict[str, str]]


def report(asked: str | None, *, again: bool = False) -> dict[str, Any]:
    """`{"sglang", "mooncake", "plugin", "fixes": [{"name", "state", "reason"}], ...}`.

    `asked`: fix names as `--plugin` takes them; None means the environment's, or
    else what a bare `--plugin` asks for. `again`: prove it now, whatever was proven before.
    Raises `ConfigError` for unknown names.
    """
    config = flags.from_env()
    wanted = config.fixes if asked is None else flags.parse_fixes(asked, PLUGIN_FLAG)
    names = fixes.DEFAULT_FIXES if wanted is None else wanted
    env = {PLUGIN_ENV: ",".join(names) or "none"}
    # A variable of the environment may ask for more than the names do.
    names = flags.from_env({**os.environ, **env}).fixes or ()
    version = release.sglang_version()
    mooncake = release.mooncake()
    result: dict[str, Any] = {
        "sglang": version,
        "untested": None if version is None else release.untested(version),
        "patches": [],
        "mooncake": None if mooncake is None else asdict(mooncake),
        "plugin": None,
        "asked": list(names),
        "standins": False,
        "proof": None,
    }
    if version is None:
        result["fixes"] = _all("SGLang is not installed in this environment; pip install sglang")
        return result
    found, result["standins"] = _load(env, again=again)
    result["plugin"] = found.as_dict()
    if found.sglang is not None:
        result["patches"] = applied.state(version, Path(found.sglang).parent)
    if found.proof is not None:
        result["proof"] = {"at": found.proof.at, "kept": found.proof.kept}
    if found.problem is not None:
        result["fixes"] = _all(found.problem)
        return result
    # Where nothing was asked for, nothing was attached.
    statuses = found.statuses or [s.as_dict() for s in fixes.arm_all(Config(fixes=()))]
    _refused(statuses, names, found.refused)
    _obstacles(statuses)
    result["fixes"] = statuses
    return result


def in_force(result: dict[str, Any]) -> bool:
    """True when everything asked for is armed or native."""
    states = {fix["name"]: fix["state"] for fix in result["fixes"]}
    return all(states[name] in (FixState.ARMED, FixState.NATIVE) for name in result["asked"])


def _all(reason: str) -> Statuses:
    state = FixState.UNSUPPORTED
    return [fixes.Status(fix.name, state, reason).as_dict() for fix in fixes.FIXES]


def _load(asked: dict[str, str], *, again: bool) -> tuple[loading.Loading, bool]:
    """What stock's loader makes of us, and whether stand-ins were used."""
    env = {**os.environ, **asked}
    if has_gpu():
        return loading.ask(env, again=again), False
    from sglang_scaling_fixes.lab.runtime import cpu_env

    return loading.ask(env, cpu_env(asked), again=again), True


def _refused(statuses: Statuses, names: tuple[str, ...], line: str | None) -> None:
    """A server that ends while it loads plugins has nothing in force.

    Where it is a fix that could not be armed, that fix's own reason says it.
    """
    if line is None or any(
        s["name"] in names and s["state"] == FixState.UNSUPPORTED for s in statuses
    ):
        return
    for status in statuses:
        if status["name"] in names:
            status.update(state=FixState.UNSUPPORTED.value, reason=f"no server starts: {line}")


def _obstacles(statuses: Statuses) -> None:
    """What a fix will refuse when a server starts, and its probe cannot know: it has no role."""
    for status, fix in zip(statuses, fixes.FIXES, strict=True):
        if status["state"] == FixState.ARMED and (obstacle := fix.obstacle()) is not None:
            status.update(state=FixState.UNSUPPORTED.value, reason=obstacle)


def has_gpu() -> bool:
    """Whether the lab's stand-ins must stay away from this machine."""
    from sglang_scaling_fixes.lab.standins import gpu

    return gpu.present() is not None
