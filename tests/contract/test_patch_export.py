"""Patches for upstream: commits that `git am` takes, and tests that are red before, green after.

The checkout is a repository made from the unpacked wheel, below `python/`: of upstream's own
history there is nothing here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.patches import export
from sglang_scaling_fixes.patches.anchors import inserted
from sglang_scaling_fixes.patches.manifest import Patch
from sglang_scaling_fixes.racecheck import patched
from tests import child
from tests.contract.wheels import source
from tests.patched_trees import KNOWN

UPSTREAM = KNOWN.upstream()
(RELEASE,) = {release for patch in UPSTREAM for release in patch.releases}
FILES = sorted({f"python/{f}" for patch in UPSTREAM for f in patch.files(RELEASE)})
AUTHOR = ("A Committer", "committer@example.invalid")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_identity_but_the_checkouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def checkout(folder: Path) -> Path:
    """A repository with the release's files; its author is in its own configuration."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source(RELEASE) / name.removeprefix("python/")).read_bytes())
    git(folder.parent, "init", "--quiet", str(folder))
    for key, value in zip(("name", "email"), AUTHOR, strict=True):
        git(folder, "config", f"user.{key}", value)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "as released")
    return folder


def exported(clone: Path, output: Path, *names: str) -> int:
    return cli.main(["patch", "export", "--to", str(clone), "--output", str(output), *names])


def test_each_is_a_commit_that_git_am_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = checkout(tmp_path / "clone")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody else")
    before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()}
    assert exported(clone, tmp_path / "out") == 0
    assert {path: path.read_bytes() for path in clone.rglob("*") if path.is_file()} == before
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(UPSTREAM)
    for number, patch in enumerate(UPSTREAM, 1):
        fresh = checkout(tmp_path / patch.name)
        mbox = tmp_path / "out" / f"{number:04d}-{patch.name}.patch"
        git(fresh, "am", "--quiet", "--keep-non-patch", str(mbox))  # the title's [tag] stays
        assert git(fresh, "log", "-1", "--format=%an <%ae>").strip() == "{} <{}>".format(*AUTHOR)
        message = git(fresh, "log", "-1", "--format=%B")
        assert message.startswith(f"{patch.title}\n\n")
        assert "Signed-off-by: {} <{}>".format(*AUTHOR) in message
        rows = [r.split("\t") for r in git(fresh, "show", "--numstat", "--format=").splitlines()]
        changed = {f"python/{name}" for name in patch.files(RELEASE)}
        assert {row[2] for row in rows} == {*changed, patch.unit_test}
        assert {row[1] for row in rows} == {"0"}, "a patch only inserts"
        assert "\n " in mbox.read_text().partition("@@")[2], "with context"


@pytest.mark.parametrize("patch", UPSTREAM, ids=lambda patch: patch.name)
def test_the_pull_request_has_upstreams_form(patch: Patch) -> None:
    text = export.request(patch)
    for heading in (
        *("Motivation", "Modifications", "Accuracy Tests", "Speed Tests and Profiling"),
        "Checklist",
    ):
        assert f"\n## {heading}\n\n" in text
    assert patch.unit_test in text and patch.reproduce in text and "TODO" not in text
    test = export.unit_test(patch).read_text()
    for form in ("register_cpu_ci(est_time=", "(CustomTestCase)", "    unittest.main()\n"):
        assert form in test
    assert patch.unit_test.startswith("test/registered/unit/")


RUFF = Path(sys.executable).with_name("ruff")


@pytest.mark.parametrize("patch", UPSTREAM, ids=lambda patch: patch.name)
def test_what_it_changes_is_laid_out_as_stock_is(patch: Patch) -> None:
    """Stock 0.5.23 is as ruff's formatter leaves it, with its defaults; so are our files."""
    sources = {str(export.unit_test(patch)): export.unit_test(patch).read_bytes()}
    for name in patch.files(RELEASE):
        stock = (source(RELEASE) / name).read_bytes()
        assert laid_out(stock) and not laid_out(stock + b"a  = 1\n")  # it would be noticed
        sources[name] = inserted(stock, patch.of(RELEASE, name))
    assert {name: laid_out(content) for name, content in sources.items()} == dict.fromkeys(
        sources, True
    )


def laid_out(content: bytes) -> bool:
    command = [str(RUFF), "format", "--isolated", "--check", "--quiet", "-"]
    return subprocess.run(command, input=content, capture_output=True, check=False).returncode == 0


def test_without_an_author_nothing_is_written(tmp_path: Path, capsys: Capture) -> None:
    clone = checkout(tmp_path / "clone")
    git(clone, "config", "--unset", "user.email")
    assert exported(clone, tmp_path / "out") == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "user.email not set there" in line and "git -C" in line
    assert not (tmp_path / "out").exists()


def test_a_checkout_with_other_lines_is_refused(tmp_path: Path, capsys: Capture) -> None:
    clone = checkout(tmp_path / "clone")
    (patch, *_) = UPSTREAM
    (file,) = patch.files(RELEASE)
    moved = clone / "python" / file
    moved.write_text(moved.read_text().replace("def prefetch_kv_buffer", "def prefetch"))
    git(clone, "commit", "--quiet", "--all", "--message", "moved")
    assert exported(clone, tmp_path / "out") == 2
    assert f"{file} has 0 of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    others = [each.name for each in UPSTREAM if each is not patch]
    assert exported(clone, tmp_path / "out", *others) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--to", "."], ["--to .", "no git checkout", "clone"]),
        (["--to", "{empty}"], ["is not in its HEAD", RELEASE]),
        (["--to", "{clone}", "index-k-wait"], ["index-k-wait is for operators", "choose from"]),
        (["--to", "{clone}", "--output", "/proc/x"], ["--output /proc/x", "another folder"]),
    ],
    ids=["no-clone", "not-sglang", "not-upstreams", "output"],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    empty = tmp_path / "empty"
    git(tmp_path, "init", "--quiet", str(empty))
    for key, value in zip(("name", "email"), AUTHOR, strict=True):
        git(empty, "config", f"user.{key}", value)
    git(empty, "commit", "--quiet", "--allow-empty", "--message", "nothing")
    known = {"empty": str(empty), "clone": str(checkout(tmp_path / "clone"))}
    assert cli.main(["patch", "export", *(each.format(**known) for each in argv)]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and all(word in line for word in words), line


def test_a_patch_for_upstream_is_not_applied_to_a_server(tmp_path: Path, capsys: Capture) -> None:
    clone = checkout(tmp_path / "clone")
    (clone / "python/sglang/srt").mkdir(exist_ok=True)
    assert cli.main(["patch", "apply", "--to", str(clone), UPSTREAM[0].name]) == 2
    assert "patch export --to CHECKOUT" in capsys.readouterr().err


def test_the_tests_are_red_before_and_green_after(tmp_path: Path) -> None:
    """As upstream runs them, `python test_x.py`; all in one process, since the import is slow."""
    files = {name.removeprefix("python/") for name in FILES}
    after = patched.copied(source(RELEASE), tmp_path / "after", files)
    for patch in UPSTREAM:
        for name in patch.files(RELEASE):
            stock = (after / name).read_bytes()
            (after / name).write_bytes(inserted(stock, patch.of(RELEASE, name)))
    for tree, red in ((source(RELEASE), True), (after, False)):
        said = run_all(tree)
        for patch in UPSTREAM:
            assert said[patch.name] == red, (tree, patch.name, said)


RUN = """
import io, json, pathlib, sys, unittest
import sglang
found = {"file": sglang.__file__}
for path in map(pathlib.Path, sys.argv[1:]):
    names = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), names)
    cases = [c for c in names.values() if isinstance(c, type) and c.__module__ == path.stem
             and issubclass(c, unittest.TestCase)]
    suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    found[path.stem] = [result.testsRun, len(result.failures) + len(result.errors)]
print("found:" + json.dumps(found))
"""


def run_all(tree: Path) -> dict[str, bool]:
    """Whether any case of a patch's test failed with this SGLang."""
    env = {**os.environ, "PYTHONPATH": str(tree)}
    tests = {patch.name: export.unit_test(patch) for patch in UPSTREAM}
    found = child.said(sys.executable, RUN, *map(str, tests.values()), env=env, mark="found:")
    assert found["file"].startswith(str(tree))
    for path in tests.values():
        assert found[path.stem][0] > 1
    return {name: bool(found[path.stem][1]) for name, path in tests.items()}
