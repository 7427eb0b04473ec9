"""`patch apply|check|revert` on the stock wheels: all or nothing, whatever goes wrong.

The trees have only the files that a series changes; nothing of SGLang is imported.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.lab.wheels import OLDER_RELEASES
from sglang_scaling_fixes.patches import change, manifest, record
from sglang_scaling_fixes.patches.manifest import Manifest
from sglang_scaling_fixes.paths import ROOT
from tests.contract.wheels import RELEASES, source
from tests.patched_trees import FILES, KNOWN, SENTINELS, changed, contents, small

NEWEST = OLDER_RELEASES[-1]
NAMES = [patch.name for patch in KNOWN.series(NEWEST)]
POOL = "sglang/srt/mem_cache/memory_pool.py"
NOBODY = 65534

Capture = pytest.CaptureFixture[str]


def patch(action: str, tree: Path, *names: str) -> int:
    return cli.main(["patch", action, "--to", str(tree), *names])


def checked(tree: Path, capsys: Capture, *names: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = patch("check", tree, "--json", *names)
    return status, json.loads(capsys.readouterr().out)


def states(tree: Path, capsys: Capture) -> dict[str, str]:
    return {each["name"]: each["state"] for each in checked(tree, capsys)[1]["patches"]}


def only(release: str) -> Manifest:
    """A manifest that knows the series of one release."""
    patches = tuple(
        dataclasses.replace(patch, releases=(release,)) for patch in KNOWN.series(release)
    )
    return Manifest(patches, KNOWN.digests)


# -- every series on every wheel -----------------------------------------------------------


@pytest.mark.parametrize("build", (*OLDER_RELEASES, *RELEASES))
def test_a_series_applies_to_its_release_and_leaves_every_other_alone(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tree = small(build, tmp_path)
    stock = contents(tree)
    for release in OLDER_RELEASES:
        monkeypatch.setattr(manifest, "load", lambda release=release: only(release))
        status = patch("apply", tree)
        said = capsys.readouterr()
        if release == build:
            assert status == 0 and ": applied. Restart" in said.out
            assert patch("revert", tree) == 0
        else:
            assert status == 2
            line = said.err.strip()
            assert "\n" not in line and line.startswith("sglang-scaling-fixes: ")
            assert str(tree) in line and release in line
            assert any(name in line for name in FILES)
        assert contents(tree) == stock


@pytest.mark.parametrize("layout", ["", "python"])
@pytest.mark.parametrize("release", OLDER_RELEASES)
def test_apply_check_and_revert(release: str, layout: str, tmp_path: Path, capsys: Capture) -> None:
    tree = small(release, tmp_path, layout)
    stock = contents(tree)
    assert checked(tree, capsys)[0] == 1
    assert patch("apply", tree) == 0
    assert set(states(tree, capsys).values()) == {"applied"}
    assert checked(tree, capsys)[0] == 0
    once = contents(tree)
    root = tree / layout
    files, sentinels = changed(release)
    for name in (*files, *sentinels):
        assert (root / name).read_bytes() != stock.get(f"{layout}/{name}".lstrip("/"))
        compile((root / name).read_bytes(), name, "exec")
    for name in sentinels:
        runpy.run_path(str(root / name))  # the sentinels find what they want to find
    capsys.readouterr()
    assert patch("apply", tree) == 0
    assert "applied already; nothing to do" in capsys.readouterr().out
    assert contents(tree) == once
    assert patch("revert", tree) == 0
    assert contents(tree) == stock
    capsys.readouterr()
    assert patch("revert", tree) == 0
    assert "not applied; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("first", NAMES)
def test_patches_come_and_go_one_by_one(first: str, tmp_path: Path, capsys: Capture) -> None:
    """Two of them share a file. Whatever stays is what it would be alone."""
    tree, alone = small(NEWEST, tmp_path / "tree"), small(NEWEST, tmp_path / "alone")
    stock = contents(tree)
    assert patch("apply", alone, first) == 0
    assert patch("apply", tree, first) == 0
    assert patch("apply", tree) == 0
    assert patch("revert", tree, *(name for name in NAMES if name != first)) == 0
    assert states(tree, capsys) == {n: "applied" if n == first else "not applied" for n in NAMES}
    assert checked(tree, capsys, first)[0] == 0
    kept = str(record.FOLDER)
    here, there = ({k: v for k, v in contents(t).items() if kept not in k} for t in (tree, alone))
    assert here == there != stock
    assert patch("revert", tree, first) == 0
    assert contents(tree) == stock


# -- files that are somebody else's ----------------------------------------------------------


@pytest.mark.parametrize("file", [*FILES, *SENTINELS])
def test_a_file_that_was_changed_is_refused_and_named(
    file: str, tmp_path: Path, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    with (tree / file).open("ab") as handle:
        handle.write(b"# a change of somebody's\n")
    before = contents(tree)
    assert patch("apply", tree) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"{file} (SHA-256 " in line and "reinstall" in line
    assert contents(tree) == before
    status, said = checked(tree, capsys)
    assert status == 1 and said["foreign"] == [file]
    # Patches that do not touch it apply.
    others = [p.name for p in KNOWN.series(NEWEST) if file not in (*p.files(NEWEST), p.sentinel)]
    assert others and patch("apply", tree, *others) == 0
    assert patch("revert", tree, *others) == 0
    assert contents(tree) == before


def test_a_file_that_changed_after_it_was_patched_is_not_taken_back(
    tmp_path: Path, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    stock = contents(tree)
    assert patch("apply", tree) == 0
    patched = (tree / POOL).read_bytes()
    (tree / POOL).write_bytes(patched + b"# a change of somebody's\n")
    before = contents(tree)
    assert patch("revert", tree) == 2
    assert POOL in capsys.readouterr().err
    assert contents(tree) == before
    # What is kept for it outlasts what others do meanwhile.
    assert patch("revert", tree, "plugin-loader") == 0
    assert patch("apply", tree, "plugin-loader") == 0
    (tree / POOL).write_bytes(patched)
    assert patch("revert", tree) == 0
    assert contents(tree) == stock


def test_what_git_patched_is_told_and_is_not_taken_back_without_its_original(
    tmp_path: Path, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    folder = ROOT / "patches" / NEWEST
    series = "".join((folder / n).read_text() for n in (folder / "series").read_text().split())
    subprocess.run(
        ["git", "apply", "--unidiff-zero"], cwd=tree, input=series, text=True, check=True
    )
    assert set(states(tree, capsys).values()) == {"applied"}
    before = contents(tree)
    assert patch("apply", tree) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert patch("revert", tree) == 2
    assert "git or patch" in capsys.readouterr().err
    assert contents(tree) == before


def test_an_original_that_is_not_what_it_was_is_not_put_back(
    tmp_path: Path, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    assert patch("apply", tree) == 0
    for kept in (tree / record.FOLDER / "originals").iterdir():
        kept.write_bytes(b"other\n")
    before = contents(tree)
    assert patch("revert", tree) == 2
    assert "is not kept" in capsys.readouterr().err
    assert contents(tree) == before


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--to", "/no/such/folder"], ["--to /no/such/folder", "sglang/srt", "checkout"]),
        (["--to", "{tree}", "index-k"], ["unknown patch 'index-k'", "index-k-wait"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    tree = str(small(NEWEST, tmp_path))
    for action in ("apply", "check", "revert"):
        assert cli.main(["patch", action, *(a.format(tree=tree) for a in argv)]) == 2
        line = capsys.readouterr().err.strip()
        assert "\n" not in line and all(word in line for word in words)


def test_a_patch_of_another_release_is_refused(tmp_path: Path, capsys: Capture) -> None:
    tree = small("0.5.9", tmp_path)
    assert patch("apply", tree, "plugin-loader") == 2
    line = capsys.readouterr().err.strip()
    assert "these patches for (0.5.10, 0.5.10.post1)" in line and "launch_server.py" in line


def test_two_targets_are_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["patch", "apply", "--to", "/x", "--installed"])
    assert ended.value.code == 2
    assert "--installed: not allowed with argument --to" in capsys.readouterr().err


def test_a_link_is_not_patched(tmp_path: Path, capsys: Capture) -> None:
    """The file behind it may be an installer's, and of other environments, too."""
    tree = small(NEWEST, tmp_path / "tree")
    moved = tmp_path / "cache.py"
    (tree / POOL).rename(moved)
    (tree / POOL).symlink_to(moved)
    before = contents(tmp_path)
    assert patch("apply", tree) == 2
    assert f"is a link to {moved}" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_another_name_of_the_file_keeps_the_old_content_and_the_mode_stays(
    tmp_path: Path,
) -> None:
    """An installer may have linked the file from its cache."""
    tree = small(NEWEST, tmp_path / "tree")
    cache = tmp_path / "cache.py"
    os.link(tree / POOL, cache)
    (tree / POOL).chmod(0o640)
    stock = cache.read_bytes()
    assert patch("apply", tree) == 0
    assert cache.read_bytes() == stock != (tree / POOL).read_bytes()
    assert stat.S_IMODE((tree / POOL).stat().st_mode) == 0o640


def test_without_a_target_it_is_the_sglang_of_this_python(tmp_path: Path) -> None:
    tree = small(NEWEST, tmp_path)
    (tree / "sglang/__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)])}
    command = [sys.executable, "-P", "-m", "sglang_scaling_fixes.cli", "patch"]
    for action, words, where in (
        ("apply", ": applied.", []),
        ("check", "index-k-wait            applied", ["--installed"]),
        ("revert", ": taken back.", ["--installed"]),
    ):
        done = subprocess.run(
            [*command, action, *where], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stdout and str(tree) in done.stdout


def test_two_at_once_do_not_meet(tmp_path: Path, capsys: Capture) -> None:
    tree = small(NEWEST, tmp_path)
    with change._alone(tree):
        assert patch("apply", tree) == 2
    assert "by another process" in capsys.readouterr().err
    assert patch("apply", tree) == 0


# -- who may not write, and who is killed ------------------------------------------------------


def child(what: Callable[[], object]) -> int:
    """Runs it in a process of its own; the exit status, negative for a signal."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: os._exit(int(what() or 0)))  # type: ignore[call-overload]
    process.start()
    process.join()
    return int(process.exitcode or 0)


@pytest.fixture
def shared_tree() -> Iterator[Path]:
    """A tree that everybody may look into: pytest's own folders are their owner's only."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield small(NEWEST, Path(name))


@pytest.mark.parametrize("closed", ["sglang", "sglang/srt/mem_cache"])
def test_a_folder_that_cannot_be_written_changes_nothing(closed: str, shared_tree: Path) -> None:
    """The second is found when the originals are kept already."""
    if os.geteuid() == 0:
        for path in (shared_tree, *shared_tree.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    (shared_tree / closed).chmod(0o555)
    before = contents(shared_tree)

    def as_somebody() -> int:
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        with tempfile.TemporaryFile("w+") as err:
            sys.stderr = err
            status = patch("apply", shared_tree)
            err.seek(0)
            line = err.read().strip()
        assert "cannot be written" in line and closed in line and "\n" not in line, line
        return status

    assert child(as_somebody) == 2
    assert contents(shared_tree) == before
    (shared_tree / closed).chmod(0o755)
    assert patch("apply", shared_tree) == 0  # the control: nothing else was in the way
    owners = {(shared_tree / name).stat().st_uid for name in (*FILES, *SENTINELS)}
    assert owners == {shared_tree.stat().st_uid}  # whoever patched, the owner can read it


def killed_at(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """SIGKILL before the rename of this number, for real. The exit status of the process."""
    stock = change._put_in_place
    done: list[Any] = []

    def put(*args: Any) -> None:
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(args)
        stock(*args)

    with monkeypatch.context() as context:
        context.setattr(change, "_put_in_place", put)
        return child(action)


RENAMES = len(FILES) + len(SENTINELS)


@pytest.mark.parametrize("number", range(RENAMES))
def test_killed_between_two_renames_is_partial_and_heals(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    stock = contents(tree)
    ended = killed_at(number, lambda: patch("apply", tree), monkeypatch)
    assert ended == -signal.SIGKILL
    half = contents(tree)
    renamed = [name for name in (*FILES, *SENTINELS) if half.get(name) != stock.get(name)]
    assert len(renamed) == number
    status, said = checked(tree, capsys)
    assert status == 1 and said["interrupted"]
    assert set(states(tree, capsys).values()) == {"partial"}
    # Where anything was renamed, a sentinel was, and lets nothing be imported.
    sentinels = [tree / name for name in SENTINELS if name in renamed]
    assert bool(sentinels) == bool(renamed)
    problems = [sentinel for sentinel in sentinels if raises(sentinel)]
    assert problems or not renamed
    assert patch("apply", tree) == 2
    assert "was not finished" in capsys.readouterr().err
    assert patch("revert", tree) == 0
    assert "an unfinished change was undone" in capsys.readouterr().out
    assert contents(tree) == stock
    assert patch("apply", tree) == 0


@pytest.mark.parametrize("number", range(RENAMES))
def test_killed_on_the_way_back_heals_as_well(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    stock = contents(tree)
    assert patch("apply", tree) == 0
    ended = killed_at(number, lambda: patch("revert", tree), monkeypatch)
    assert ended == -signal.SIGKILL
    assert set(states(tree, capsys).values()) == {"partial"}
    sentinels = [tree / name for name in SENTINELS if (tree / name).exists()]
    files = [name for name in FILES if contents(tree)[name] != stock[name]]
    assert sentinels and (
        len(files) == len(FILES) or any(raises(sentinel) for sentinel in sentinels)
    )
    assert patch("revert", tree) == 0
    assert contents(tree) == stock


def raises(sentinel: Path) -> bool:
    try:
        runpy.run_path(str(sentinel))
    except RuntimeError as error:
        assert "sglang-scaling-fixes: " in str(error) and "patch revert" in str(error)
        return True
    return False


def test_a_rename_that_fails_undoes_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    assert patch("apply", tree, "index-k-wait") == 0
    before = contents(tree)
    stock = change._put_in_place
    done: list[Any] = []

    def fails_once(*args: Any) -> None:
        done.append(args)
        if len(done) == 4:
            raise OSError(28, "No space left on device", str(args[0]))
        stock(*args)

    monkeypatch.setattr(change, "_put_in_place", fails_once)
    assert patch("apply", tree) == 2
    assert "No space left" in capsys.readouterr().err
    assert contents(tree) == before
    assert set(states(tree, capsys).values()) == {"applied", "not applied"}


def test_what_cannot_be_undone_either_is_told_and_healed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tree = small(NEWEST, tmp_path)
    stock = contents(tree)
    put, done = change._put_in_place, []

    def fails_from_the_fourth_on(*args: Any) -> None:
        done.append(args)
        if len(done) >= 4:
            raise OSError(28, "No space left on device", str(args[0]))
        put(*args)

    with monkeypatch.context() as context:
        context.setattr(change, "_put_in_place", fails_from_the_fourth_on)
        assert patch("apply", tree) == 2
    line = capsys.readouterr().err.strip()
    assert "in part only" in line and "patch revert" in line and "\n" not in line
    assert set(states(tree, capsys).values()) == {"partial"}
    assert patch("revert", tree) == 0
    assert contents(tree) == stock


def test_a_patch_that_shares_a_file_is_not_torn_apart(tmp_path: Path, capsys: Capture) -> None:
    """The loader and the copies change the scheduler; another file of the copies is nobody's."""
    tree = small(NEWEST, tmp_path)
    assert patch("apply", tree, "copies-follow-forwards") == 0
    other = tree / "sglang/srt/managers/cache_controller.py"
    other.write_bytes(other.read_bytes() + b"# a change of somebody's\n")
    before = contents(tree)
    assert patch("apply", tree, "plugin-loader") == 2
    assert "cache_controller.py (SHA-256 " in capsys.readouterr().err
    assert contents(tree) == before


# -- from a wheel ------------------------------------------------------------------------------


def test_an_installed_package_brings_the_patches(tmp_path: Path) -> None:
    """As pip installs it: no checkout, no git."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sglang_scaling_fixes", copy / "sglang_scaling_fixes", ignore=ignored)
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    tree = small(NEWEST, tmp_path / "tree")
    script = (
        "import sglang_scaling_fixes as p, sys; from sglang_scaling_fixes import cli;"
        "from sglang_scaling_fixes.racecheck import patched;"
        "assert p.__file__.startswith(sys.argv[1]), p.__file__;"
        "patched.patched('0.5.9', __import__('pathlib').Path(sys.argv[3]), "
        "__import__('pathlib').Path(sys.argv[1]) / 'scratch');"
        "sys.exit(cli.main(['patch', 'apply', '--to', sys.argv[2]]))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": "/nonexistent"}
    where = [str(tmp_path / "site"), str(tree), str(source("0.5.9"))]
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *where],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert set(FILES) <= {name for name in contents(tree) if name.endswith(".py")}
