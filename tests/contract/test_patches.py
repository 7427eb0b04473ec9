"""The patches of releases without a plugin loader: one command works, every other way fails loudly.

On the stock wheels, with the tools people have: git and GNU patch. What a tree is worth is told by
importing its modules, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_scaling_fixes import racecheck
from sglang_scaling_fixes.lab.runtime import STANDINS, cpu_env
from sglang_scaling_fixes.lab.wheels import OLDER_RELEASES
from sglang_scaling_fixes.paths import ROOT
from sglang_scaling_fixes.racecheck import patches
from tests import child
from tests.contract.wheels import source

RIGHT = patches.APPLY
PLAIN = ("git", "apply")
PATCH = ("patch", "--strip=1")
BATCH = (*PATCH, "--batch")

POOL, CONTROLLER, SCHEDULER = (
    f"sglang.srt.{name}"
    for name in ("mem_cache.memory_pool", "managers.cache_controller", "managers.scheduler")
)
INDEX_K, COPIES = "0001-index-k-wait.patch", "0002-copies-follow-forwards.patch"
OF = {POOL: INDEX_K, CONTROLLER: COPIES, SCHEDULER: COPIES}
"""The patch that changes a module."""
POOL_FILE = "sglang/srt/mem_cache/memory_pool.py"

IMPORTS = """
import importlib, json, os, sys
from sglang_scaling_fixes.racecheck import recording_cuda

recording_cuda.install()
found = {}
for tree, modules in json.loads(sys.argv[1]).items():
    reader, writer = os.pipe()
    if os.fork() == 0:  # no tree sees what another has imported
        sys.path.insert(0, tree)
        said = {"sglang": importlib.import_module("sglang").__file__}
        for name in modules:
            try:
                importlib.import_module(name)
                said[name] = "imported"
            except Exception as error:
                said[name] = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        found[tree] = json.loads(pipe.read())
    os.wait()
print("found:" + json.dumps(found))
"""


def series(release: str, *only: str) -> str:
    """The patches of a release in one text, as the documented command pipes them."""
    return "".join(f.read_text() for f in patches.files(release) if not only or f.name in only)


def tree(release: str, folder: Path) -> Path:
    """A release to patch, the files of the patches compiled as an installer leaves them."""
    own = set().union(*(patches.changed(series(r)) for r in OLDER_RELEASES))
    target = patches.copied(source(release), folder, own)
    for name in own:
        if (target / name).exists():
            compiled(target / name, target / name, py_compile.PycInvalidationMode.TIMESTAMP)
    return target


def compiled(file: Path, of: Path, mode: py_compile.PycInvalidationMode) -> None:
    """Leave the bytecode of `of` where Python looks for that of `file`."""
    cache = Path(importlib.util.cache_from_source(str(file)))
    cache.unlink(missing_ok=True)  # perhaps a link to that of the wheel
    py_compile.compile(str(of), cfile=str(cache), doraise=True, invalidation_mode=mode)


def apply(command: tuple[str, ...], text: str, to: Path) -> int:
    """Exit status. Without a terminal: GNU patch would ask there."""
    return subprocess.run(
        command,
        cwd=to,
        input=text,
        text=True,
        capture_output=True,
        start_new_session=True,
        check=False,
    ).returncode


def contents(target: Path) -> dict[str, bytes]:
    names = patches.changed(series(OLDER_RELEASES[0]))
    return {name: (target / name).read_bytes() for name in names if (target / name).exists()}


def imports(trees: dict[Path, list[str]]) -> dict[Path, dict[str, str]]:
    """By tree: what importing each of these modules ended in."""
    env = cpu_env({"CUDA_VISIBLE_DEVICES": ""})
    env.pop(STANDINS)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
    asked = json.dumps({str(path): modules for path, modules in trees.items()})
    found = child.said(sys.executable, IMPORTS, asked, env=env, mark="found:")
    for path in trees:
        assert Path(found[str(path)].pop("sglang")).is_relative_to(path)
    return {path: found[str(path)] for path in trees}


def refused(said: str, module: str) -> bool:
    """One clear line: the patch, the release it is for, the file, and what to do."""
    return (
        said.startswith(f"RuntimeError: sglang-scaling-fixes: {OF[module]} is for SGLang 0.5.")
        and "\n" not in said
        and "/sglang/srt/" in said
        and "Reinstall SGLang" in said
        and "git apply --unidiff-zero" in said
    )


def without_source(target: Path) -> None:
    apply(RIGHT, series(target.name), target)
    file = target / POOL_FILE
    py_compile.compile(str(file), cfile=str(file.with_suffix(".pyc")), doraise=True)
    file.unlink()


def with_old_bytecode(target: Path) -> None:
    stock = target / "stock.py"
    shutil.copyfile(target / POOL_FILE, stock)
    apply(RIGHT, series(target.name), target)
    compiled(target / POOL_FILE, stock, py_compile.PycInvalidationMode.UNCHECKED_HASH)


def in_steps(*steps: tuple[tuple[str, ...], str]) -> Callable[[Path], None]:
    def way(target: Path) -> None:
        for command, text in steps:
            apply(command, text, target)

    return way


def wrong_ways(release: str) -> dict[str, tuple[Callable[[Path], None], list[str]]]:
    """What is done to a stock tree, and the modules that must not be importable after it."""
    own, everywhere = series(release), list(OF)
    ways = {
        "plain git apply": (in_steps((PLAIN, own)), everywhere),
        "plain git apply of the first": (in_steps((PLAIN, series(release, INDEX_K))), [POOL]),
        "twice, with patch": (in_steps((PATCH, own), (PATCH, own)), everywhere),
        "twice, with patch --batch": (in_steps((BATCH, own), (BATCH, own)), everywhere),
        "git, then patch": (in_steps((RIGHT, own), (PATCH, own)), everywhere),
        "without its source": (without_source, [POOL]),
        "with bytecode of before": (with_old_bytecode, [POOL]),
    }
    for other in OLDER_RELEASES:
        if (text := series(other)) == own:
            continue
        for command in (RIGHT, PLAIN, PATCH):
            name = f"{' '.join(command)} of the series for {other}"
            ways[name] = (in_steps((command, text)), everywhere)
        mixed = in_steps((RIGHT, series(release, INDEX_K)), (RIGHT, series(other, COPIES)))
        ways[f"the second patch from {other}"] = (mixed, [CONTROLLER, SCHEDULER])
        over = in_steps((RIGHT, own), (PATCH, text))
        ways[f"over it the series for {other}"] = (over, everywhere)
    return ways


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_what_is_applied_wrongly_cannot_be_imported(build: str, tmp_path: Path) -> None:
    names, trees = {}, {}
    for number, (name, (way, modules)) in enumerate(wrong_ways(build).items()):
        target = tree(build, tmp_path / str(number) / build)
        way(target)
        names[target], trees[target] = name, modules
    accepted = {
        f"{names[target]}: {module}": what
        for target, said in imports(trees).items()
        for module, what in said.items()
        if not refused(what, module)
    }
    assert not accepted, "\n".join(f"{where}: {what}" for where, what in accepted.items())


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_each_patch_works_alone(build: str, tmp_path: Path) -> None:
    trees = {}
    for name in (INDEX_K, COPIES):
        target = tree(build, tmp_path / name)
        assert apply(RIGHT, series(build, name), target) == 0
        trees[target] = list(OF)
    assert imports(trees) == {target: dict.fromkeys(OF, "imported") for target in trees}


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_a_second_time_is_refused_and_changes_nothing(build: str, tmp_path: Path) -> None:
    target = tree(build, tmp_path / build)
    assert apply(RIGHT, series(build), target) == 0
    once = contents(target)
    status = apply(RIGHT, series(build), target)
    assert status != 0
    assert contents(target) == once
    other = tree(build, tmp_path / "patch")
    assert apply(PATCH, series(build), other) == 0
    assert contents(other) == once  # GNU patch, once, comes to the same


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_what_a_tree_is_patched_with_can_be_told(build: str, tmp_path: Path) -> None:
    def told(target: Path) -> dict[str, str]:
        return {patch["name"]: patch["state"] for patch in patches.state(build, target)}

    stock, right, one, wrong = (tree(build, tmp_path / name) for name in "abcd")
    assert set(told(stock).values()) == {"not applied"}
    assert apply(RIGHT, series(build), to=right) == 0
    assert told(right) == {INDEX_K: "applied", COPIES: "applied"}
    assert apply(RIGHT, series(build, COPIES), to=one) == 0
    assert told(one) == {INDEX_K: "not applied", COPIES: "applied"}
    assert apply(PLAIN, series(build), to=wrong) == 0
    assert all(state.startswith("applied wrongly") for state in told(wrong).values())


def test_the_documented_command_orders_the_copies() -> None:
    """0.5.9 is among the builds of test_racecheck.py; the patches of the other two are the same."""
    named = ("load-before-index-read", "load-over-inflight-write", "writeback-before-forward-write")
    report = racecheck.check("0.5.10.post1", "on", named)
    assert {h["name"]: h["verdict"] for h in report["hazards"]} == dict.fromkeys(named, "ordered")


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_the_command_of_the_documents(build: str, tmp_path: Path) -> None:
    """As it is printed there; in an environment within somebody's git repository, too."""
    text = (patches.FOLDER.parent / "docs" / "hicache-ordering.md").read_text()
    block = text.split("```bash\n", 1)[1].split("```", 1)[0]
    assert block.endswith(f"| {' '.join(RIGHT)}\n")
    folder = re.compile(r"^PATCHES=\S+", re.MULTILINE)
    script, places = folder.subn(f"PATCHES={patches.FOLDER / build}", block)
    assert places == 1
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("venv/\n")
    target = tree(build, tmp_path / "venv")
    env = {
        **os.environ,
        "PYTHONPATH": str(target),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, check=True)
    assert contents(target) == contents(patches.patched(build, source(build), tmp_path))
    assert subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, check=False).returncode
