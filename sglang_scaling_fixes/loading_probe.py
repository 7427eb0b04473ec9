"""Runs in a fresh process, by its path: what SGLang's plugin loader finds here, and whom it calls.

    python -P loading_probe.py installed     the entry points, as the loader would find them
    python -P loading_probe.py load          stock's own `load_plugins`, then what is in force

Prints one line, `MARK` and JSON. `-P` keeps the current folder out of the path, so that only what
is really installed is found. Only the standard library is imported at the top: this package may
be what cannot be imported here.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

MARK = "sglang-scaling-fixes-loading:"
LOADER = "sglang.srt.plugins"
"""Stock's module with `load_plugins`, and the name of its group of entry points."""
PACKAGE = "sglang_scaling_fixes"
DISTRIBUTION = "sglang-scaling-fixes"


def installed() -> dict[str, Any]:
    """`{"ours", "others", "copies", "folder", "error"}`.

    `ours`: names of the entry points that lead to this package; `others`: `{name: distribution}`
    of the rest; `copies`: `[{"version", "folder"}]` of every installed copy, the first is the one
    that counts; `folder`: where the code comes from; `error`: why it cannot be imported.
    """
    found: dict[str, Any] = {"ours": [], "others": {}, "folder": None, "error": None}
    for entry in metadata.entry_points(group=LOADER):
        if not _is_ours(entry):
            found["others"][entry.name] = entry.dist.name if entry.dist else entry.value
            continue
        found["ours"].append(entry.name)
        try:
            entry.load()
        except Exception as error:  # what stock's loader logs, and goes on
            found["error"] = _said(error)
    package = sys.modules.get(PACKAGE)
    if package is not None:
        found["folder"] = next(iter(package.__path__))
    found["copies"] = [
        {"version": copy.version, "folder": str(copy.locate_file(""))}
        for copy in metadata.distributions(name=DISTRIBUTION)
    ]
    return found


def _is_ours(entry: metadata.EntryPoint) -> bool:
    return entry.value.partition(":")[0].partition(".")[0].strip() == PACKAGE


def load() -> dict[str, Any]:
    """`{"sglang", "loader", "called", "refused", "error", "statuses"}`.

    `loader`: whether there is one; `called`: whether it called this plugin; `refused`: the line
    with which a server would end here; `error`: what the loader caught of ours; `statuses`: what
    is in force, as `plugin.statuses` says it.
    """
    import sglang

    found: dict[str, Any] = {"sglang": getattr(sglang, "__version__", None), "loader": False}
    found |= {"called": False, "refused": None, "error": None, "statuses": []}
    load_plugins = _loader()
    if load_plugins is None:
        return found
    found["loader"] = True
    heard = _Heard()
    logging.getLogger(LOADER).addHandler(heard)
    try:
        load_plugins()
    except SystemExit as end:
        found["refused"] = str(end.code)
    found["error"] = heard.error
    plugin = sys.modules.get(f"{PACKAGE}.plugin")
    if plugin is not None:
        found["called"] = plugin.activated()
        found["statuses"] = plugin.statuses()
        _hooked_again(found["statuses"])
    return found


def _loader() -> Callable[[], None] | None:
    """Stock's `load_plugins`, None where the release has none."""
    try:
        module = importlib.import_module(LOADER)
    except ModuleNotFoundError as error:
        if error.name != LOADER:
            raise
        return None
    found: Callable[[], None] | None = getattr(module, "load_plugins", None)
    return found


def _hooked_again(statuses: list[dict[str, str]]) -> None:
    """The loader has applied every other plugin's hooks by now; who lies under one is not armed."""
    from sglang_scaling_fixes.attach import require_in_place
    from sglang_scaling_fixes.errors import AttachError

    for status in statuses:
        if status["state"] != "armed":
            continue
        try:
            require_in_place(status["name"], "decode", "prefill", "both", "server")
        except AttachError as error:
            status.update(state="unsupported", reason=str(error))


class _Heard(logging.Handler):
    """The last error of this plugin that stock's loader logged and went on from."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: str | None = None
        entries = metadata.entry_points(group=LOADER)
        self._names = [entry.name for entry in entries if _is_ours(entry)]

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and any(name in record.getMessage() for name in self._names):
            self.error = _said(error)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(MARK + json.dumps({"installed": installed, "load": load}[sys.argv[1]]()), flush=True)
