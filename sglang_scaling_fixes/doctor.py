"""`sglang-scaling-fixes doctor`: what this environment has, and which fixes hold in it.

The fixes are attached to the installed SGLang and proven in a process of their own,
exactly as a server would. Without a GPU stock SGLang cannot be imported; then, and
only then, the lab's stand-ins are used, and the report says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from sglang_scaling_fixes import fixes, release
from sglang_scaling_fixes.config import DEFAULT_FIXES, PLUGIN_ENV, PLUGIN_FLAG, Config, parse_fixes
from sglang_scaling_fixes.errors import ConfigError

_MARK = "sglang-scaling-fixes-doctor:"
_PROBE = "from sglang_scaling_fixes.doctor import probe_here; probe_here()"
_TIMEOUT = 600.0
"""Seconds the probe may take: a cold import of SGLang is slow on a busy machine."""


def report(asked: str | None) -> dict[str, Any]:
    """`{"sglang", "mooncake", "fixes": [{"name", "state", "reason"}], ...}`.

    `asked`: fix names as `--plugin` takes them; None means the environment's, or
    else what a bare `--plugin` asks for. Raises `ConfigError` for unknown names.
    """
    config = Config.from_env()
    wanted = config.fixes if asked is None else parse_fixes(asked, PLUGIN_FLAG)
    names = DEFAULT_FIXES if wanted is None else wanted
    version = release.sglang_version()
    mooncake = release.mooncake()
    result: dict[str, Any] = {
        "sglang": version,
        "mooncake": None if mooncake is None else asdict(mooncake),
        "asked": list(names),
        "standins": False,
    }
    if version is None:
        reason = "SGLang is not installed in this environment; pip install sglang"
        statuses = [
            fixes.Status(fix.name, fixes.State.UNSUPPORTED, reason).as_dict() for fix in fixes.FIXES
        ]
    else:
        statuses, result["standins"] = _probe(names)
        _without_mooncake(statuses, mooncake)
    result["fixes"] = statuses
    return result


def in_force(result: dict[str, Any]) -> bool:
    """True when everything asked for is armed or native."""
    states = {fix["name"]: fix["state"] for fix in result["fixes"]}
    return all(states[name] in ("armed", "native") for name in result["asked"])


def probe_here() -> None:
    """Runs in the child: arm what the environment asks for and print the states."""
    statuses = [status.as_dict() for status in fixes.arm_all(Config.from_env())]
    print(_MARK + json.dumps(statuses), flush=True)


def _without_mooncake(statuses: list[dict[str, str]], mooncake: release.Mooncake | None) -> None:
    problem = release.mooncake_problem(mooncake)
    for status in statuses:
        if problem and status["name"] == "safe-reclaim" and status["state"] == "armed":
            status.update(state="unsupported", reason=problem)


def _probe(names: tuple[str, ...]) -> tuple[list[dict[str, str]], bool]:
    """The states as a server process would find them, and whether stand-ins were used."""
    asked = {PLUGIN_ENV: ",".join(names) or "none"}
    standins = not has_gpu()
    if standins:
        from sglang_scaling_fixes.lab.runtime import cpu_env

        env = cpu_env(asked)
    else:
        env = {**os.environ, **asked}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=env,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            statuses: list[dict[str, str]] = json.loads(line.removeprefix(_MARK))
            return statuses, standins
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    raise ConfigError(f"the installed SGLang could not be probed: {last}")


def has_gpu() -> bool:
    """Whether the lab's stand-ins must stay away from this machine."""
    from sglang_scaling_fixes.lab.standins import gpu

    return gpu.present() is not None
