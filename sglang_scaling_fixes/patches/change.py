"""Files of a tree changed all or not at all: patches applied, and taken back.

    1  every digest is checked, every new file is built and compiled: nothing is written yet
    2  originals and the record are kept
    3  every new file is written beside the old one, and is on the disk
    4  each is renamed into its place: sentinels first, and last on the way back

A process that is killed before step 4 leaves the old files. Killed within it, it leaves a tree
that the sentinels do not let SGLang import, which `check` calls partial, and `revert` heals from
the originals.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_scaling_fixes.errors import ConfigError, ScalingFixesError
from sglang_scaling_fixes.patches import record
from sglang_scaling_fixes.patches.anchors import inserted
from sglang_scaling_fixes.patches.manifest import Manifest
from sglang_scaling_fixes.patches.record import Record
from sglang_scaling_fixes.patches.tree import Tree, read, recognise, sha256

Files = dict[str, bytes | None]
"""`{file: content}`; None: not there."""


@dataclass(frozen=True)
class Done:
    """What a command did to a tree."""

    tree: Tree
    """As it was before."""
    changed: tuple[str, ...]
    """The patches that were applied or taken back; none: there was nothing to do."""
    healed: bool = False
    """Whether an unfinished change was undone; the tree is as it was released."""


def interrupted(root: Path) -> bool:
    """Whether an earlier change of this tree was not finished."""
    kept = record.load(root)
    return kept is not None and kept.interrupted(root)


def apply(manifest: Manifest, root: Path, names: Iterable[str] = ()) -> Done:
    """Apply these patches, or the whole series, beside those that the tree has.

    Raises `ForeignFile`, or `ConfigError` for a tree of no known release, with an unfinished
    change, that cannot be written, or whose originals are not kept.
    """
    with _alone(root):
        _require_finished(root)
        tree = recognise(manifest, root, names)
        tree.require_known()
        missing = tuple(p.name for p in tree.patches if tree.state(p) != "applied")
        if missing:
            _require_regular(tree)
            whole = _whole(tree)
            before = [p.name for p in whole.patches if whole.state(p) == "applied"]
            _to(whole, {*before, *missing})
        return Done(tree, missing)


def revert(manifest: Manifest, root: Path, names: Iterable[str] = ()) -> Done:
    """Take these patches back, or all. An unfinished change ends as stock, whatever is named.

    Raises as `apply` does.
    """
    with _alone(root):
        kept = record.load(root)
        if kept is not None and kept.interrupted(root):
            _heal(root, kept)
            return Done(recognise(manifest, root), (), healed=True)
        tree = recognise(manifest, root, names)
        tree.require_known()
        going = tuple(p.name for p in tree.patches if tree.state(p) != "not applied")
        if going:
            whole = _whole(tree)
            staying = [p.name for p in whole.patches if whole.state(p) == "applied"]
            _to(whole, {*staying} - {*going})
        return Done(tree, going)


def _whole(tree: Tree) -> Tree:
    """The same tree, seen with the whole series: patches that are not named may be there, too.

    Raises `ForeignFile` where one of them shares a file with those that are named, and another
    file of it is nobody's: what it has in the shared file could not be kept apart.
    """
    series = tree.manifest.series(tree.release)
    shared = frozenset[str]().union(*(has or () for has in tree.files.values()))
    known = [
        p for p in series if p in tree.patches or p.name in shared or not _foreign(tree, p.name)
    ]
    whole = Tree(tree.manifest, tree.root, tree.release, tuple(known))
    whole.require_known()
    return whole


def _foreign(tree: Tree, name: str) -> bool:
    patch = tree.manifest.patch(name)
    return Tree(tree.manifest, tree.root, tree.release, (patch,)).state(patch) == "foreign"


def _to(tree: Tree, names: set[str]) -> None:
    """Give the tree exactly these patches of those it is seen with."""
    stock = _stock(tree)
    new = _built(tree, stock, names)
    _compile(tree.root, new)
    now = {name: tree.content(name) for name in new}
    kept = record.load(tree.root)
    # Of files that are nobody's now; they may be put back as they were.
    earlier = {} if kept is None else {n: d for n, d in kept.stock.items() if n not in new}
    goal = Record(
        tree.release,
        [patch.name for patch in tree.patches if patch.name in names],
        stock=earlier | {name: sha256(content) for name, content in stock.items()},
        goal={name: sha256(content) for name, content in new.items()},
        was={name: sha256(content) for name, content in now.items()},
    )
    sentinels = {patch.sentinel for patch in tree.patches}
    order = {True: 0, False: 2}  # a sentinel that comes, and one that goes

    def turn(name: str) -> tuple[int, str]:
        return (order[new[name] is not None] if name in sentinels else 1), name

    changed = sorted((name for name in new if new[name] != now[name]), key=turn)
    with _writing(tree.root):
        _replace_all(tree.root, {name: new[name] for name in changed}, goal, stock, now)


def _stock(tree: Tree) -> Files:
    """Every file as released: as it is, where it has no patch, else as it was kept."""
    kept = record.load(tree.root)
    stock: Files = {}
    for name, has in tree.files.items():
        if not has:
            stock[name] = tree.content(name)
        elif kept is None or name not in kept.stock:
            raise ConfigError(
                f"{tree.root / name} was patched in another way (git or patch), and its original "
                "is not kept; reinstall SGLang, delete the sentinels "
                f"({', '.join(p.sentinel for p in tree.patches)}), and apply it with this command"
            )
        else:
            stock[name] = record.original(tree.root, kept, name)
    return stock | {patch.sentinel: None for patch in tree.patches}


def _built(tree: Tree, stock: Files, names: set[str]) -> Files:
    """Every file with these patches. Each has the digest of the manifest, or nothing is done."""
    chosen = [patch for patch in tree.patches if patch.name in names]
    new: Files = {}
    for name, content in stock.items():
        insertions = [i for p in chosen for i in p.of(tree.release, name)]
        new[name] = inserted(content, insertions) if content is not None else None
        if content is not None:
            has = frozenset(p.name for p in chosen if name in p.files(tree.release))
            expected = tree.manifest.digests[tree.release, name][has]
            if sha256(new[name]) != expected:
                raise ScalingFixesError(f"{name} came out as another file than the manifest says")
    return new | {patch.sentinel: tree.sentinel(patch) for patch in chosen}


def _compile(root: Path, files: Files) -> None:
    for name, content in files.items():
        if content is not None:
            try:
                compile(content, str(root / name), "exec", dont_inherit=True)
            except SyntaxError as error:
                raise ScalingFixesError(f"{name} would not compile: {error}") from error


def _replace_all(root: Path, new: Files, goal: Record, stock: Files, now: Files) -> None:
    """Steps 2 to 4. What fails before the end is undone, and raised."""
    before = record.load(root)
    try:
        record.save(root, goal, stock)
        for name, content in new.items():
            if content is not None:
                _write_beside(root / name, content)
            _forget_bytecode(root / name)
        for name, content in new.items():
            _put_in_place(root / name, content)
    except BaseException as error:
        _undo(root, new, now, before, error)
        raise
    over = goal.patches or goal.stock.keys() - goal.goal.keys()
    _settle(root, replace(goal, finished=True) if over else None)


def _undo(root: Path, new: Files, now: Files, before: Record | None, error: BaseException) -> None:
    """Every file as it was. Raises `ConfigError` where that fails, too; `revert` can later."""
    try:
        for name in new:  # first: they take the space that is wanted
            if _beside(root / name).exists():
                _beside(root / name).unlink()
        for name in reversed(new):
            _put(root / name, now[name])
        _settle(root, before)
    except OSError as second:
        raise ConfigError(
            f"{root} could be changed in part only ({error}), and that could not be undone "
            f"({second}); run `sglang-scaling-fixes patch revert` on it when it can be written"
        ) from error


def _settle(root: Path, kept: Record | None) -> None:
    """The change is over: this is what the tree has; None: nothing, it is stock's."""
    if kept is None:
        record.drop(root)
    else:
        record.save(root, kept)


def _heal(root: Path, kept: Record) -> None:
    """Every file is stock's again, whatever it was on the way to; nobody's files are left alone."""
    for name in kept.goal:
        found = sha256(read(root / name))
        if found not in (kept.stock[name], kept.was[name], kept.goal[name]):
            raise ConfigError(
                f"{root / name} was changed by somebody else since; nothing was taken back. Put "
                "it back as it was, or reinstall SGLang"
            )
    originals = {name: record.original(root, kept, name) for name in kept.goal}
    with _writing(root):
        for name in sorted(originals, key=lambda name: originals[name] is None):  # sentinels last
            _put(root / name, originals[name])
        record.drop(root)


# -- one file ------------------------------------------------------------------------------


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.scaling-fixes")


def _write_beside(file: Path, content: bytes) -> None:
    """With the mode and the owner of the old file: a server must be able to read it."""
    beside = _beside(file)
    record.write(beside, content)
    there = file.exists()
    about = (file if there else file.parent).stat()
    beside.chmod(stat.S_IMODE(about.st_mode) if there else 0o644)
    with contextlib.suppress(PermissionError):  # root can give a file away, others need not
        os.chown(beside, about.st_uid, about.st_gid)


def _put_in_place(file: Path, content: bytes | None) -> None:
    """A rename, so that a hard link's other name (an installer's cache) keeps the old content."""
    if content is None:
        file.unlink(missing_ok=True)
    else:
        _beside(file).replace(file)
    record.sync(file.parent)


def _put(file: Path, content: bytes | None) -> None:
    """Both steps for one file, unless it has this content already."""
    if read(file) != content:
        if content is not None:
            _write_beside(file, content)
        _forget_bytecode(file)
        _put_in_place(file, content)
    if _beside(file).exists():
        _beside(file).unlink()


def _forget_bytecode(file: Path) -> None:
    """Python runs unchecked bytecode without comparing it with its source."""
    for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        cached.unlink(missing_ok=True)


# -- around it -----------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One command at a time. The lock is on the folder itself, and leaves nothing behind."""
    handle = os.open(root / "sglang", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"{root} is being patched by another process; wait for it") from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = errno.errorcode.get(error.errno or 0, "OSError")
        raise ConfigError(
            f"{error.filename or root} cannot be written ({what}: {error.strerror}); nothing was "
            "changed. Run it as who may write there, or patch a copy with --to PATH"
        ) from error


def _require_finished(root: Path) -> None:
    if interrupted(root):
        raise ConfigError(
            f"an earlier change of {root} was not finished; first run `sglang-scaling-fixes patch "
            "revert` on it"
        )


def _require_regular(tree: Tree) -> None:
    for name in tree.files:
        if (tree.root / name).is_symlink():
            raise ConfigError(
                f"{tree.root / name} is a link to {(tree.root / name).resolve()}; patch that tree, "
                "or a copy without links"
            )
