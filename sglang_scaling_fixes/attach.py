"""The one way to wrap a place in stock SGLang, and the record such a place is given by.

Every package lists the places it relies on as `AttachPoint`s in its `points.py`; `wrap` and
`replace` take such a record, so nothing is touched that is not listed. `fixes.ATTACH_POINTS` joins
them: it is the whole surface between this project and SGLang's private code. The contract tests
resolve every record against every supported wheel without importing it, so a name that moved
upstream fails a test before it fails a server.

Why not SGLang's own `HookRegistry`: it fails open. A target that is missing and a hook that cannot
be installed are logged, and the server starts without them. And it installs hooks only after all
plugins have been loaded. A plugin that leaves its work to it cannot prove in `activate` that its
hooks are in place, and `activate` is the last moment in which it can stop the start.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sglang_scaling_fixes.errors import AttachError

FIRST_RELEASE = "0.5.11"
"""First stock release with a plugin loader (entry-point group `sglang.srt.plugins`)."""
LAST_RELEASE = "0.5.23"
"""Newest stock release whose wheel the contract tests have read."""

_MARK = "__sglang_scaling_fixes__"

Role = Literal["decode", "prefill", "both", "server"]


@dataclass(frozen=True)
class AttachPoint:
    """One place in stock SGLang that a fix relies on.

    `target` is `"module:Qual.name"`; `params` are the parameter names (after
    self/cls) the adapter relies on, a prefix of the real ones; `uses` are
    attributes of the same class (own or inherited) the adapter reads or writes.
    """

    fix: str
    role: Role
    target: str
    params: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    first: str = FIRST_RELEASE
    last: str = LAST_RELEASE
    wrapped: bool = True
    """False: called or wrapped on the object, the class itself is left alone."""


def catalogue(names: Mapping[str, Any]) -> tuple[AttachPoint, ...]:
    """The points among a module's names, in their order: how a `points.py` lists its own."""
    return tuple(value for value in names.values() if isinstance(value, AttachPoint))


def resolve(target: str) -> tuple[Any, str, Any]:
    """Import and return `(owner, attribute name, raw attribute)` of a target.

    Raises `AttachError` naming the target when any part of it is missing.
    """
    module_name, _, qualname = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise AttachError(f"{module_name} cannot be imported ({error})") from error
    *path, name = qualname.split(".")
    for part in path:
        if not hasattr(owner, part):
            raise AttachError(f"{module_name} has no {qualname}")
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise AttachError(f"{module_name} has no {qualname}")
    raw = owner.__dict__.get(name, getattr(owner, name))
    return owner, name, raw


def present(alternatives: Sequence[AttachPoint]) -> AttachPoint:
    """The first of these places that this release has. `AttachError` where it has none."""
    for point in alternatives:
        try:
            resolve(point.target)
        except AttachError:
            continue
        return point
    targets = " and ".join(point.target for point in alternatives)
    raise AttachError(f"this release has neither of {targets}")


_replaced: dict[AttachPoint, tuple[Any, Any]] = {}
"""Point -> the wrapper put there, and what stood there before (None: inherited)."""


def wrap(point: AttachPoint, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, *args, **kwargs)`, once."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        return wrapper

    replace(point, make)


def replace(point: AttachPoint, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by `make(original)`, once; for methods so hot that one call more counts.

    Class and static methods stay what they are. An inherited method is wrapped
    on the named class only, so other backends that share the base are left
    alone. Wrapping twice is an error: two layers would count twice. So is
    wrapping a point whose record says that it is left alone.
    """
    target = point.target
    if not point.wrapped:
        raise AttachError(f"{target} is listed as a place that is not wrapped")
    owner, name, raw = resolve(target)
    if getattr(getattr(raw, "__func__", raw), _MARK, False):
        raise AttachError(f"{target} is already wrapped")
    kind: Callable[[Any], Any] | None = None
    original = raw
    if isinstance(raw, classmethod | staticmethod):
        kind = type(raw)
        original = raw.__func__
    elif hasattr(raw, "__self__") and isinstance(raw.__self__, type):
        # An inherited classmethod, seen bound through the subclass.
        kind = classmethod
        original = raw.__func__

    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    installed = kind(wrapper) if kind is not None else wrapper
    _replaced[point] = installed, vars(owner).get(name)
    setattr(owner, name, installed)


def require_in_place(fix: str, *roles: str) -> None:
    """What `fix` has attached for these roles is what stock still calls: nobody has put something
    in its place.

    Other plugins' hooks are applied when all plugins have been loaded, so after our probe.
    Raises `AttachError` naming the first place that is not as we left it.
    """
    for point, (installed, _) in _replaced.items():
        if point.fix != fix or point.role not in roles:
            continue
        if resolve(point.target)[2] is not installed:
            raise AttachError(
                f"{point.target} was hooked again by something else after {fix} was proven, so it "
                "may no longer be in force; load the plugins apart (SGLANG_PLUGINS), or start "
                f"without {fix}"
            )


def unwrap(points: Iterable[AttachPoint]) -> None:
    """Put back what stood at these points before we wrapped them.

    For wrappers that have nothing to do in this process: the hottest of them run for every
    token and every turn of a scheduler's loop. One that somebody else has wrapped again stays.
    """
    for point in points:
        if point not in _replaced:
            continue
        installed, before = _replaced[point]
        owner, name, raw = resolve(point.target)
        if raw is not installed:
            continue
        del _replaced[point]
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def unwrap_other_roles(fix: str, role: str) -> None:
    """This process keeps its role: remove the wrappers of `fix` that only other roles need."""
    unwrap([point for point in _replaced if point.fix == fix and point.role not in (role, "both")])


def unwrap_class(target: str) -> None:
    """The class `module:Name` is about to be replaced by another: take off what was wrapped on it,
    by whichever fix. It would wrap nothing that runs, and look as if somebody had taken its place.
    """
    unwrap([point for point in _replaced if point.target.startswith(f"{target}.")])


def is_there(point: AttachPoint) -> bool:
    """Whether this release has the place: for a point that not all of them have."""
    try:
        resolve(point.target)
    except AttachError:
        return False
    return True


def is_wrapped(target: str) -> bool:
    """True when `target` resolves and currently runs through our wrapper."""
    try:
        _, _, raw = resolve(target)
    except AttachError:
        return False
    return bool(getattr(getattr(raw, "__func__", raw), _MARK, False))


def require_wrapped(points: Iterable[AttachPoint]) -> None:
    """Each of these points that is to be wrapped runs through our wrapper.

    Raises `AttachError` naming the first that does not.
    """
    for point in points:
        if point.wrapped and not is_wrapped(point.target):
            raise AttachError(f"probe: {point.target} is not wrapped")
