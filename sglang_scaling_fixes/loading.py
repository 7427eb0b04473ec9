"""Whether a server of this environment loads this plugin: asked of stock's own loader.

Stock calls a plugin only where the release has a loader, the package is installed beside it,
SGLANG_PLUGINS does not leave it out, and it can be imported. Where one of these is missing stock
starts without it, and at most logs that. None of our code runs then, so no server can refuse to
start; only somebody who asks from outside notices. `ask` does, in fresh processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_scaling_fixes import child_process, fixes, loading_probe, proof_store
from sglang_scaling_fixes.attach import FIRST_RELEASE, LAST_RELEASE
from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.fixes import FixState
from sglang_scaling_fixes.flags import left_out
from sglang_scaling_fixes.patches import manifest
from sglang_scaling_fixes.paths import PACKAGE
from sglang_scaling_fixes.proof_store import Proof
from sglang_scaling_fixes.release import sglang_version, version_tuple

_PROBE = Path(loading_probe.__file__)
_TIMEOUT_S = 600.0
"""Seconds each question may take: a cold import of SGLang is slow on a busy machine."""


@dataclass(frozen=True)
class Loading:
    """What stock's loader did with this plugin."""

    problem: str | None
    """Why a server runs without it, with the remedy; None where the loader called it."""
    refused: str | None = None
    """The line with which a server would end while it loads plugins; None where it would go on."""
    statuses: list[dict[str, str]] = field(default_factory=list)
    """What is in force then, as `/server_info` says it."""
    folder: str | None = None
    """Where a server takes the plugin's code from."""
    copies: list[dict[str, str]] = field(default_factory=list)
    """`{"version", "folder"}` of every installed copy; the first is the one that counts."""
    sglang: str | None = None
    """SGLang's folder."""
    patched: bool = False
    """Whether it is not stock's loader that called, but our patch."""
    proof: Proof | None = None
    """When the states were proven; None where there is nothing to keep."""

    @property
    def _caller(self) -> str:
        return f"the patch {loading_probe.PATCH}" if self.patched else "stock's own loader"

    def as_dict(self) -> dict[str, Any]:
        return {
            "loaded": self.problem is None,
            "reason": self.problem or f"called by {self._caller}",
            "folder": self.folder,
            "copies": self.copies,
        }


def ask(
    env: Mapping[str, str], runtime: Mapping[str, str] | None = None, *, again: bool = False
) -> Loading:
    """Let a fresh process load plugins as a server with the environment `env` does.

    `runtime`: the environment to import SGLang in, where it cannot be imported in `env` itself
    (no GPU). What is installed is still asked in `env`: the stand-ins may add to the path.
    Whom the loader calls is asked each time. What is in force then is proven once for the same
    files and environment, and anew if `again`.
    Raises `ConfigError` where the process ends without an answer.
    """
    here = _answer("installed", env)
    runtime = env if runtime is None else runtime
    there, proof = _nobody_called(here), None
    if there is None:
        there, proof = _proven(here["state"], runtime, again=again)
    return Loading(
        problem=_problem(here, there, env),
        refused=there["refused"],
        statuses=there["statuses"],
        folder=here["folder"],
        copies=here["copies"],
        sglang=here["sglang"],
        patched=here["patched"],
        proof=proof,
    )


def _nobody_called(here: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of a process in which no code of ours runs; None where it does, or may."""
    if here["loader"] and here["calls"] is not False:
        return None
    there = {"sglang": sglang_version(), "loader": here["loader"], "called": False}
    return {**there, "refused": None, "error": None, "statuses": []}


def _proven(
    state: str, runtime: Mapping[str, str], *, again: bool
) -> tuple[dict[str, Any], Proof | None]:
    key = proof_store.key(state, runtime)
    if not again and (kept := proof_store.read(key)) is not None:
        return kept.answer, kept
    answer = _answer("load", runtime)
    if not _sound(answer):
        return answer, None
    return answer, proof_store.write(key, answer)


def _sound(answer: dict[str, Any]) -> bool:
    """Whether everything asked for was in force. Anything else is looked at anew each time."""
    missing = {fix.name for fix in fixes.FIXES if fix.missing}
    bad = [
        status["name"]
        for status in answer["statuses"]
        if status["state"] == FixState.UNSUPPORTED and status["name"] not in missing
    ]
    return bool(answer["called"] and answer["refused"] is answer["error"] is None and not bad)


def _answer(question: str, env: Mapping[str, str]) -> Any:
    try:
        return child_process.ask(
            "-P",
            str(_PROBE),
            question,
            env=env,
            mark=loading_probe.MARK,
            timeout_s=_TIMEOUT_S,
        )
    except child_process.NoAnswerInTime as error:
        raise ConfigError(
            f"the installed SGLang did not say what it loads within {_TIMEOUT_S:.0f} s; try again "
            "when this machine is less busy"
        ) from error
    except child_process.NoAnswer as error:
        raise ConfigError(
            f"the installed SGLang could not be asked what it loads: {error}"
        ) from error


def _problem(here: dict[str, Any], there: dict[str, Any], env: Mapping[str, str]) -> str | None:
    """The first reason why a server runs without the plugin of this very copy."""
    if not there["loader"]:
        return _without_loader(there["sglang"] or "")
    if here["patched"] and not here["calls"]:
        return (
            f"this SGLang has the patch {loading_probe.PATCH}, and {loading_probe.PACKAGE} cannot "
            f"be imported by {sys.executable}: no server starts; pip install it there"
        )
    if not here["ours"] and not here["patched"]:
        return _not_installed(here["copies"])
    if there["called"] or there["refused"] is not None:
        return _another_copy(here["folder"])
    return left_out(env, here["ours"][0]) or _not_called(here, there)


def _not_called(here: dict[str, Any], there: dict[str, Any]) -> str:
    name = here["ours"][0]
    if here["error"] is not None:
        return f"its entry point cannot be imported ({here['error']}); install it anew"
    if there["error"] is not None:
        return f"it failed while stock loaded it ({there['error']}), and stock goes on without it"
    if name in here["others"]:
        return (
            f"{here['others'][name]} calls its plugin {name} too, and stock keeps one of a name; "
            "uninstall one of the two"
        )
    return f"stock's loader did not call it, although it is installed in {here['folder']}"


def _without_loader(version: str) -> str:
    if version_tuple(version) >= version_tuple(FIRST_RELEASE):
        return (
            f"SGLang {version} has no {loading_probe.LOADER}.load_plugins; releases from "
            f"{FIRST_RELEASE} to {LAST_RELEASE} are known to load plugins: use one of them"
        )
    patches = [patch.name for patch in manifest.load().series(version)]
    instead = (
        f", or put in what there is for it: sglang-scaling-fixes patch apply {' '.join(patches)}"
        if patches
        else ""
    )
    return (
        f"SGLang {version} has no plugin loader, so none of its servers loads this plugin, "
        f"whatever {PLUGIN_ENV} says; use {FIRST_RELEASE} or later, the first release that has "
        f"one{instead}"
    )


def _not_installed(copies: list[dict[str, str]]) -> str:
    if copies:
        return (
            f"{loading_probe.DISTRIBUTION} {copies[0]['version']} in {copies[0]['folder']} is "
            "installed without its entry point; install it anew"
        )
    return (
        f"{loading_probe.DISTRIBUTION} is not installed for {sys.executable} (a folder on "
        "PYTHONPATH is not enough: stock looks for an entry point); pip install it there"
    )


def _another_copy(folder: str | None) -> str | None:
    if folder is not None and Path(folder).resolve() == PACKAGE:
        return None
    return (
        f"a server takes the plugin from {folder}, and this is the copy in {PACKAGE}; uninstall "
        "one of the two"
    )
