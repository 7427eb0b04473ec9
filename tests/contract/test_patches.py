"""The texts of the patches, with the tools people have: one way works, every other fails loudly.

On the stock wheels, with git and GNU patch; `patch apply` is in `test_patch_command.py`. What a
tree is worth is told by importing its modules, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_scaling_fixes.lab.runtime import STANDINS, cpu_env
from sglang_scaling_fixes.lab.wheels import OLDER_RELEASES
from sglang_scaling_fixes.patches import applied, change
from sglang_scaling_fixes.paths import ROOT
from sglang_scaling_fixes.racecheck import patched
from tests import child
from tests.contract.wheels import source
from tests.patched_trees import FILES, KNOWN, SENTINELS

FOLDER = ROOT / "patches"
RIGHT = ("git", "apply", "--unidiff-zero")
"""Without the option, git puts lines that have no context at the end of a file."""
PLAIN = ("git", "apply")
PATCH = ("patch", "--strip=1")
BATCH = (*PATCH, "--batch")

POOL, CONTROLLER, SCHEDULER = (
    f"sglang.srt.{name}"
    for name in ("mem_cache.memory_pool", "managers.cache_controller", "managers.scheduler")
)
LOADER, INDEX_K, COPIES = "plugin-loader", "index-k-wait", "copies-follow-forwards"
OF = {POOL: INDEX_K, CONTROLLER: COPIES, SCHEDULER: COPIES}
"""The patch that changes a module, beside the loader."""
WAITS = (INDEX_K, COPIES)
SRT = "sglang.srt"
"""Whatever is imported, this is imported first: the loader's sentinel."""
POOL_FILE = "sglang/srt/mem_cache/memory_pool.py"

IMPORTS = """
import importlib.util, json, os, sys
from sglang_scaling_fixes.racecheck import recording_cuda

recording_cuda.install()
found = {}
for tree, modules in json.loads(sys.argv[1]).items():
    reader, writer = os.pipe()
    if os.fork() == 0:  # no tree sees what another has imported
        sys.path.insert(0, tree)
        said = {"sglang": importlib.util.find_spec("sglang").origin}
        for name in modules:
            if name == "the copies' fences":
                from sglang_scaling_fixes.ordering import probe
                from sglang_scaling_fixes.ordering.points import CONTROLLER, HYBRID
                from sglang_scaling_fixes.presence import exists
                fenced = [
                    probe.fenced(cls, f"start_{what}")
                    for cls in (CONTROLLER, HYBRID) if exists(cls.partition(":")[0])
                    for what in ("loading", "writing")
                ]
                said[name] = f"{fenced}, index-K {probe.index_k_waits()}"
                continue
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
    names = (FOLDER / release / "series").read_text().split()
    wanted = only or (LOADER, *WAITS)
    return "".join((FOLDER / release / n).read_text() for n in names if n[:-6].endswith(wanted))


def tree(release: str, folder: Path) -> Path:
    """A release to patch, the files of the patches compiled as an installer leaves them."""
    own = {name for name in FILES if (source(release) / name).exists()}
    target = patched.copied(source(release), folder, own)
    for name in own:
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
    return {
        name: (target / name).read_bytes()
        for name in (*FILES, *SENTINELS)
        if (target / name).exists()
    }


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
    name = OF.get(module, LOADER)
    return (
        said.startswith("RuntimeError: sglang-scaling-fixes: 000")
        and f"-{name}.patch is for SGLang 0.5." in said
        and "\n" not in said
        and "/sglang/srt/" in said
        and f"sglang-scaling-fixes patch revert {name}`, or reinstall SGLang" in said
        and f"sglang-scaling-fixes patch apply {name}`" in said
    )


def without_source(target: Path) -> None:
    apply(RIGHT, series(target.name, *WAITS), target)
    file = target / POOL_FILE
    py_compile.compile(str(file), cfile=str(file.with_suffix(".pyc")), doraise=True)
    file.unlink()


def with_old_bytecode(target: Path) -> None:
    stock = target / "stock.py"
    shutil.copyfile(target / POOL_FILE, stock)
    apply(RIGHT, series(target.name, *WAITS), target)
    compiled(target / POOL_FILE, stock, py_compile.PycInvalidationMode.UNCHECKED_HASH)


def in_steps(*steps: tuple[tuple[str, ...], str]) -> Callable[[Path], None]:
    def way(target: Path) -> None:
        for command, text in steps:
            apply(command, text, target)

    return way


def changes(way: Callable[[Path], None], target: Path) -> bool:
    """Whether the tree is another one after it. Git does nothing where a file is not there."""
    before = contents(target)
    way(target)
    return contents(target) != before


def wrong_ways(release: str) -> dict[str, tuple[Callable[[Path], None], list[str]]]:
    """What is done to a stock tree, and the modules that must not be importable after it."""
    own, everywhere = series(release, *WAITS), list(OF)
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
        if (text := series(other, *WAITS)) == own:
            continue
        for command in (RIGHT, PLAIN, PATCH):
            name = f"{' '.join(command)} of the waits for {other}"
            ways[name] = (in_steps((command, text)), everywhere)
        # Git applies nothing where one file is not there, and says so.
        if all((source(release) / f).exists() for f in KNOWN.patch(COPIES).files(other)):
            mixed = in_steps((RIGHT, series(release, INDEX_K)), (RIGHT, series(other, COPIES)))
            ways[f"the copies from {other}"] = (mixed, [CONTROLLER, SCHEDULER])
        over = in_steps((RIGHT, own), (PATCH, text))
        ways[f"over it the waits for {other}"] = (over, everywhere)
    return ways


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_what_is_applied_wrongly_cannot_be_imported(build: str, tmp_path: Path) -> None:
    names, trees = {}, {}
    ways = wrong_ways(build)
    for number, (name, (way, modules)) in enumerate(ways.items()):
        target = tree(build, tmp_path / str(number) / build)
        if changes(way, target):
            names[target], trees[target] = name, modules
    assert len(trees) > len(ways) // 2
    accepted = {
        f"{names[target]}: {module}": what
        for target, said in imports(trees).items()
        for module, what in said.items()
        if not refused(what, module)
    }
    assert not accepted, "\n".join(f"{where}: {what}" for where, what in accepted.items())


LOADED = OLDER_RELEASES[1:]
"""The releases with a loader of ours."""


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_a_loader_that_is_applied_wrongly_stops_every_import(build: str, tmp_path: Path) -> None:
    """Its sentinel is the first that Python runs of `sglang.srt`: here it is run alone."""
    ways = {
        f"that of {other}, {len(text)} characters": in_steps((RIGHT, text))
        for other in LOADED
        if other != build
        for text in (series(other, LOADER), series(other))
    }
    if build in LOADED:
        own = series(build, LOADER)
        ways |= {
            "plain git apply": in_steps((PLAIN, own)),
            "twice, with patch": in_steps((PATCH, own), (PATCH, own)),
            "behind the copies": in_steps((RIGHT, series(build, COPIES)), (RIGHT, own)),
        }
    assert ways
    for number, (name, way) in enumerate(ways.items()):
        target = tree(build, tmp_path / str(number))
        if not changes(way, target):
            continue
        with pytest.raises(RuntimeError) as raised:
            runpy.run_path(str(target / "sglang/srt/__init__.py"))
        assert refused(f"RuntimeError: {raised.value}", SRT), name


FENCED = "the copies' fences"
"""Not a module: what the probes of hicache-ordering find in what was imported."""


ORDERED = {
    ("0.5.9", INDEX_K): "[False, False], index-K True",
    ("0.5.9", COPIES): "[True, True], index-K False",
    ("0.5.9", *WAITS): "[True, True], index-K True",
    ("0.5.10.post1", LOADER, *WAITS): "[True, True, True, True], index-K True",
}
"""What the probes of `hicache-ordering` find where these patches of a release are applied."""


def test_each_patch_works_alone_and_with_the_others(tmp_path: Path) -> None:
    """It orders what it is for, and nothing else: the others are each other's control."""
    trees, expected = {}, {}
    for number, ((build, *names), found) in enumerate(ORDERED.items()):
        target = tree(build, tmp_path / str(number))
        assert apply(RIGHT, series(build, *names), target) == 0
        trees[target] = [SRT, *OF, FENCED]
        expected[target] = dict.fromkeys((SRT, *OF), "imported") | {FENCED: found}
    assert imports(trees) == expected


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_the_sentinels_accept_what_is_right_for_their_release(build: str, tmp_path: Path) -> None:
    ways: tuple[tuple[str, ...], ...] = ((INDEX_K,), (COPIES,), WAITS)
    if build in LOADED:
        ways += ((LOADER,), (LOADER, COPIES), (LOADER, *WAITS))
    for names in ways:
        target = tree(build, tmp_path / ",".join(names))
        assert apply(RIGHT, series(build, *names), target) == 0
        sentinels = [target / name for name in SENTINELS if (target / name).exists()]
        assert len(sentinels) == len(names)
        for sentinel in sentinels:
            assert "_PATCH" in runpy.run_path(str(sentinel))


def test_without_the_plugin_the_loader_stops_the_import(tmp_path: Path) -> None:
    target = tree(OLDER_RELEASES[-1], tmp_path)
    assert apply(RIGHT, series(OLDER_RELEASES[-1], LOADER), target) == 0
    sentinel = str(target / "sglang/srt/__init__.py")
    for isolated, path in ((True, None), (False, str(ROOT))):
        options = ["-S", "-I"] if isolated else ["-S"]
        env = {**os.environ, "PYTHONPATH": path or ""}
        done = child.finished([sys.executable, *options, sentinel], env)
        assert bool(done.returncode) == isolated
        if isolated:
            last = done.stderr.strip().splitlines()[-1]
            assert "sglang_scaling_fixes cannot be imported here. Install it" in last
            assert "patch revert plugin-loader" in last


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
        return {patch["name"]: patch["state"] for patch in applied.state(build, target)}

    stock, right, one, wrong = (tree(build, tmp_path / name) for name in "abcd")
    assert set(told(stock).values()) == {"not applied"}
    assert apply(RIGHT, series(build), to=right) == 0
    every = (LOADER, *WAITS) if build in LOADED else WAITS
    assert told(right) == dict.fromkeys(every, "applied")
    assert apply(RIGHT, series(build, COPIES), to=one) == 0
    assert told(one) == {**dict.fromkeys(every, "not applied"), COPIES: "applied"}
    assert apply(PLAIN, series(build), to=wrong) == 0
    assert set(told(wrong).values()) == {applied.WRONGLY}


@pytest.mark.parametrize("build", OLDER_RELEASES)
def test_the_command_of_the_documents(build: str, tmp_path: Path) -> None:
    """As it is printed there; in an environment within somebody's git repository, too."""
    text = (ROOT / "docs" / "patches.md").read_text()
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "git apply" in b]
    assert block.endswith(f"| {' '.join(RIGHT)}\n")
    folder = re.compile(r"^PATCHES=\S+", re.MULTILINE)
    script, places = folder.subn(f"PATCHES={FOLDER / build}", block)
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
    other = tree(build, tmp_path / "other")
    change.apply(KNOWN, other)
    assert contents(target) == contents(other)
    assert subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, check=False).returncode
