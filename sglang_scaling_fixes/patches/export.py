"""Patches for upstream as commits on a checkout: one idea each, with its test and its own words.

The checkout is only read. Each commit is made on its HEAD in an object store of its own and
leaves as an mbox for `git am`; beside it lies the text of its pull request. Author and sign-off
are those of the checkout's git configuration: nobody is made up.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.patches.anchors import inserted
from sglang_scaling_fixes.patches.manifest import Patch

TESTS = Path(__file__).with_name("upstream")
LAYOUT = "python"
"""Where upstream's repository has the package."""


@dataclass(frozen=True)
class Exported:
    """One patch, ready to send."""

    patch: Patch
    mbox: Path
    request: Path


class Checkout:
    """A git repository with `python/sglang`, read through git."""

    def __init__(self, path: Path) -> None:
        self.path = path
        top = self._maybe("rev-parse", "--show-toplevel")
        if top is None:
            raise ConfigError(
                f"--to {path} is no git checkout (or git is not installed); clone SGLang's "
                "repository and give its folder"
            )
        self.author = {name: self._maybe("config", "--get", f"user.{name}") for name in _IDENTITY}
        if missing := [f"user.{name}" for name, value in self.author.items() if not value]:
            raise ConfigError(
                f"--to {path}: {' and '.join(missing)} not set there, and commits need an author; "
                f"run git -C {path} config {missing[0]} ..."
            )

    def read(self, file: str) -> bytes | None:
        """A file of HEAD; None where it is not there."""
        done = self._git("cat-file", "blob", f"HEAD:{file}", check=False)
        return done.stdout if done.returncode == 0 else None

    def mbox(self, files: Mapping[str, bytes], message: str, store: Path) -> bytes:
        """One commit on HEAD with these files in place, as `git format-patch` writes it.

        `store`: an empty folder for its objects and its index.
        """
        env = {
            "GIT_INDEX_FILE": str(store / "index"),
            "GIT_OBJECT_DIRECTORY": str(store / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self._objects()),
            # Not what the environment may say of somebody else.
            **{
                f"GIT_{who}_{name.upper()}": str(value)
                for who in ("AUTHOR", "COMMITTER")
                for name, value in self.author.items()
            },
        }
        (store / "objects").mkdir()
        self._git("read-tree", "HEAD", env=env)
        for name, content in files.items():
            blob = self._said("hash-object", "-w", "--stdin", env=env, text=content)
            self._git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=env)
        tree = self._said("write-tree", env=env)
        head = self._said("rev-parse", "HEAD")
        commit = self._said("commit-tree", tree, "-p", head, env=env, text=message.encode())
        made = self._git("format-patch", "-1", "--stdout", commit, env=env)
        return made.stdout

    def _objects(self) -> Path:
        found = Path(self._said("rev-parse", "--git-path", "objects"))
        return found if found.is_absolute() else self.path.resolve() / found

    def _said(self, *arguments: str, env: Mapping[str, str] = {}, text: bytes = b"") -> str:
        return self._git(*arguments, env=env, text=text).stdout.decode().strip()

    def _maybe(self, *arguments: str) -> str | None:
        try:
            done = self._git(*arguments, check=False)
        except FileNotFoundError:  # no git
            return None
        return done.stdout.decode().strip() if done.returncode == 0 else None

    def _git(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        text: bytes = b"",
        check: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            ["git", "-C", str(self.path), *arguments],
            env={**os.environ, **(env or {})},
            input=text,
            capture_output=True,
            check=False,
        )
        if check and done.returncode:
            why = (done.stderr.decode().strip().splitlines() or ["no output"])[-1]
            raise ConfigError(f"git {arguments[0]} in {self.path} failed: {why}")
        return done


_IDENTITY = ("name", "email")


def export(patches: tuple[Patch, ...], checkout: Checkout, folder: Path) -> list[Exported]:
    """Write `NNNN-name.patch` and `NNNN-name.md` for each. All are checked before one is written.

    Raises `AnchorError` where the checkout has not the place that lines of ours go to, and
    `ConfigError` where it has the test already, lacks a file, or the folder cannot be written.
    """
    changed = [(patch, _files(patch, checkout)) for patch in patches]
    done = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (patch, files) in enumerate(changed, 1):
            with tempfile.TemporaryDirectory() as store:
                mbox = checkout.mbox(files, _message(patch, checkout), Path(store))
            name = f"{number:04d}-{patch.name}"
            one = Exported(patch, folder / f"{name}.patch", folder / f"{name}.md")
            one.mbox.write_bytes(mbox)
            one.request.write_text(request(patch))
            done.append(one)
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be written ({error.strerror}); give another folder"
        ) from error
    return done


def _files(patch: Patch, checkout: Checkout) -> dict[str, bytes]:
    (release,) = patch.releases
    files = {}
    for name in patch.files(release):
        path = f"{LAYOUT}/{name}"
        content = checkout.read(path)
        if content is None:
            raise ConfigError(
                f"--to {checkout.path}: {path} is not in its HEAD; check out SGLang {release} or "
                "later"
            )
        files[path] = inserted(content, patch.of(release, name))
    if checkout.read(patch.unit_test) is not None:
        raise ConfigError(f"--to {checkout.path}: {patch.unit_test} is there already")
    return {**files, patch.unit_test: unit_test(patch).read_bytes()}


def unit_test(patch: Patch) -> Path:
    """Our copy of the test that travels with the patch."""
    return TESTS / Path(patch.unit_test).name


def _message(patch: Patch, checkout: Checkout) -> str:
    name, email = checkout.author["name"], checkout.author["email"]
    body = f"{_wrapped(patch.problem)}\n\n{_wrapped(patch.fix)}"
    return f"{patch.title}\n\n{body}\n\nSigned-off-by: {name} <{email}>\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 72, break_on_hyphens=False)


def request(patch: Patch) -> str:
    """The pull request's text, in upstream's form."""
    problem, fix = (" ".join(text.split()) for text in (patch.problem, patch.fix))
    cost = patch.cost + (f" (`{patch.cost_command}`)" if patch.cost_command else "")
    return f"""# {patch.title}

## Motivation

{problem}

Seen with `{patch.reproduce}`. Related: {patch.upstream}.

## Modifications

{fix}

## Accuracy Tests

No model's output changes where nothing was wrong: the change adds an order, or a refusal.
`{patch.unit_test}` fails before it and passes after it (`python {patch.unit_test}`, no GPU).

## Speed Tests and Profiling

{cost[0].upper()}{cost[1:]}.

## Checklist

- [ ] Format your code according to the pre-commit hooks.
- [x] Add unit tests: `{patch.unit_test}`.
- [ ] Update documentation: none describes this.
- [ ] Provide accuracy and speed benchmark results: see above.
"""
