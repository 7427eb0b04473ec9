"""Runs in a fresh process, by its path: what SGLang's plugin loader finds here, and whom it calls.

    python -P loading_probe.py installed     the entry points, and whom stock's loader would call
    python -P loading_probe.py load          stock's own `load_plugins`, then what is in force

The first imports nothing of SGLang but its loader, which takes a second. The second imports what a
scheduler imports.

Prints one line, `MARK` and JSON. `-P` keeps the current folder out of the path, so that only what
is really installed is found. Only the standard library is imported at the top: this package may
be what cannot be imported here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

MARK = "sglang-scaling-fixes-loading:"
LOADER = "sglang.srt.plugins"
"""Stock's module with `load_plugins`, and the name of its group of entry points."""
PATCH = "plugin-loader"
"""The patch that calls this package where a release has no loader; `patches/manifest.toml`."""
PACKAGE = "sglang_scaling_fixes"
DISTRIBUTION = "sglang-scaling-fixes"


def installed() -> dict[str, Any]:
    """`{"ours", "others", "copies", "folder", "error", "sglang", "loader", ...}`.

    `ours`: names of the entry points that lead to this package; `others`: `{name: distribution}`
    of the rest; `copies`: `[{"version", "folder"}]` of every installed copy, the first is the one
    that counts; `folder`: where the code comes from; `error`: why it cannot be imported.
    `sglang`: SGLang's folder; `loader`: whether it has a loader; `patched`: whether that is ours;
    `calls`: whether it calls this plugin (None: it cannot be told without the rest of SGLang);
    `state`: see `_state`.
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
    folders = _folders("sglang")
    found["sglang"] = folders[0] if folders else None
    found["patched"] = _patched(folders)
    if found["patched"]:  # its lines import this package, and ask no entry point
        found["folder"] = next(iter(_folders(PACKAGE)), None)
        found["loader"], found["calls"] = True, found["folder"] is not None
    else:
        found["loader"], found["calls"] = _decision(folders)
    found["state"] = _state(folders)
    return found


def _decision(folders: list[str]) -> tuple[bool, bool | None]:
    """Let stock's own loader decide whom it calls: is there one, and does it call this plugin?

    `folders`: SGLang's, whose own `__init__` would import torch and is left out. Our entry point
    only notes that it is called. Hooks of other plugins are not applied.
    """
    if not any(Path(folder, "srt", "plugins").exists() for folder in folders):
        return False, None
    sys.modules["sglang"] = bare = ModuleType("sglang")
    bare.__path__ = folders
    called: list[bool] = []
    try:
        loader = importlib.import_module(LOADER)
        for entry in filter(_is_ours, metadata.entry_points(group=LOADER)):
            setattr(sys.modules[entry.module], entry.attr, lambda: called.append(True))
        loader.HookRegistry.apply_hooks = lambda *_: None
        loader.load_plugins()
    except (Exception, SystemExit):  # another plugin's; a server tells what becomes of it
        return True, None
    return True, bool(called)


def _patched(folders: list[str]) -> bool:
    """Whether the sentinel of our loader is there. It tells itself whether it is right."""
    for file in (Path(folder, "srt", "__init__.py") for folder in folders):
        if file.is_file() and f'_NAME = "{PATCH}"' in file.read_text():
            return True
    return False


def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _state(folders: list[str]) -> str:
    """A digest of everything here that decides what is in force, but for the environment.

    The sources of SGLang (in `folders`) and of every plugin by size and time of change, all
    distributions by name, version and time of installation, Python, and this machine's boot.
    """
    said: list[object] = [sys.version, sys.executable, sys.path, _boot()]
    for folder in map(Path, sys.path):
        if folder.is_dir():
            infos = (*folder.glob("*.dist-info"), *folder.glob("*.egg-info"))
            said += [(str(info), info.stat().st_mtime_ns) for info in sorted(infos)]
    tops = {entry.module.partition(".")[0] for entry in metadata.entry_points(group=LOADER)}
    for source in (*folders, *(found for top in sorted(tops) for found in _folders(top))):
        said += sorted(_sources(source))
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _sources(folder: str) -> Iterator[tuple[str, int, int]]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _sources(entry.path)
        elif entry.name.endswith(".py"):
            about = entry.stat()
            yield entry.path, about.st_size, about.st_mtime_ns


def _boot() -> str:
    """Drivers may change with a boot. Empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


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
    """Stock's `load_plugins`, or what our patch calls in its place; None where there is neither."""
    if _patched(_folders("sglang")):
        importlib.import_module("sglang.srt")  # its sentinel compares the lines that call
        from sglang_scaling_fixes.entry import activate

        return activate
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
