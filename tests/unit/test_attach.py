"""Wrapping stock's methods: what a method was, it stays."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import pytest

from sglang_scaling_fixes import attach
from sglang_scaling_fixes.attach import (
    AttachPoint,
    is_wrapped,
    require_in_place,
    resolve,
    unwrap,
    unwrap_class,
    wrap,
)
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.fixes import ATTACH_POINTS

SOURCE = """
class Base:
    def method(self, x): return ("method", x)
    @classmethod
    def build(cls, x): return (cls.__name__, x)
    @staticmethod
    def plain(x): return ("plain", x)
class Child(Base): pass
class Sibling(Base): pass
"""


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("stock_module")
    exec(SOURCE, module.__dict__)
    monkeypatch.setitem(sys.modules, "stock_module", module)
    monkeypatch.setattr(attach, "_replaced", {})
    return module


def at(place: str) -> AttachPoint:
    return AttachPoint("fix", "both", f"stock_module:{place}")


def loudly(original: Any, *args: Any) -> Any:
    return ("ours", original(*args))


def test_kinds_of_methods_are_kept(stock: Any) -> None:
    for name in ("method", "build", "plain"):
        wrap(at(f"Base.{name}"), loudly)
    assert stock.Base().method(1) == ("ours", ("method", 1))
    assert stock.Child.build(2) == ("ours", ("Child", 2))
    assert stock.Base.plain(3) == ("ours", ("plain", 3))


def test_an_inherited_method_is_wrapped_on_the_named_class_only(stock: Any) -> None:
    wrap(at("Child.method"), loudly)
    wrap(at("Child.build"), loudly)
    assert stock.Child().method(1) == ("ours", ("method", 1))
    assert stock.Child.build(1) == ("ours", ("Child", 1))
    assert stock.Sibling().method(1) == ("method", 1)
    assert stock.Sibling.build(1) == ("Sibling", 1)


def test_wrapping_twice_is_refused(stock: Any) -> None:
    assert not is_wrapped("stock_module:Base.method")
    wrap(at("Base.method"), loudly)
    assert is_wrapped("stock_module:Base.method")
    with pytest.raises(AttachError, match="already"):
        wrap(at("Base.method"), loudly)


def test_what_is_unwrapped_is_what_it_was(stock: Any) -> None:
    before = dict(vars(stock.Base))
    points = [at("Child.method"), at("Child.build")]
    points += [at(f"Base.{name}") for name in ("method", "build", "plain")]
    for point in points:
        wrap(point, loudly)
    elsewhere = AttachPoint("fix", "both", "no_such_module:A.b")
    unwrap([*points, at("Base.never_wrapped"), elsewhere])
    assert dict(vars(stock.Base)) == before
    assert not {"method", "build"} & set(vars(stock.Child))
    wrap(at("Base.method"), loudly)  # and it can be wrapped anew
    assert stock.Base().method(1) == ("ours", ("method", 1))


def test_a_wrapper_that_somebody_wrapped_stays(stock: Any) -> None:
    wrap(at("Base.method"), loudly)
    inner = stock.Base.method

    @functools.wraps(inner)
    def theirs(self: Any, x: int) -> Any:
        return ("theirs", inner(self, x))

    stock.Base.method = theirs
    unwrap([at("Base.method")])
    assert stock.Base().method(1) == ("theirs", ("ours", ("method", 1)))


def test_a_place_that_another_plugin_hooked_later_is_named(stock: Any) -> None:
    """Stock applies hooks once all plugins are loaded, and their wrapper passes for ours."""
    target = "stock_module:Base.method"
    wrap(at("Base.method"), loudly)
    require_in_place("fix", "both")
    inner = stock.Base.method
    stock.Base.method = functools.wraps(inner)(lambda self, x: ("theirs", x))
    assert is_wrapped(target), "the mark is copied with it"
    with pytest.raises(AttachError, match=r"Base\.method was hooked again"):
        require_in_place("fix", "decode", "both")
    require_in_place("fix", "decode")  # of no use here, so of no concern


def test_a_class_that_is_replaced_leaves_no_wrapper_behind(stock: Any) -> None:
    """Control: with one left on the old class, the new one's method looks hooked again."""
    before = dict(vars(stock.Base))
    wrap(at("Sibling.method"), loudly)
    wrap(at("Base.method"), loudly)
    old, new = stock.Base, type("New", (), {"method": lambda self, x: ("new", x)})
    stock.Base = new
    with pytest.raises(AttachError, match=r"Base\.method was hooked again"):
        require_in_place("fix", "both")
    stock.Base = old
    unwrap_class("stock_module:Base")
    assert dict(vars(old)) == before
    assert is_wrapped("stock_module:Sibling.method")
    stock.Base = new
    require_in_place("fix", "both")


@pytest.mark.parametrize(
    "target", ["stock_module:Base.moved", "stock_module:Gone.method", "no_such_module:A.b"]
)
def test_what_moved_is_named(stock: Any, target: str) -> None:
    with pytest.raises(AttachError, match=target.partition(":")[0]):
        resolve(target)
    assert not is_wrapped(target)


def test_targets_are_unique() -> None:
    targets = [point.target for point in ATTACH_POINTS]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("told", [False, True], ids=["control", "told"])
def test_a_class_that_we_replace_was_not_taken_by_somebody_else(stock: Any, told: bool) -> None:
    for place in ("Base.method", "Sibling.plain"):
        wrap(at(place), loudly)
    if told:
        unwrap_class("stock_module:Base")
    stock.Base = type("Base", (), {"method": lambda self, x: x})
    if told:
        require_in_place("fix", "both")
        assert is_wrapped("stock_module:Sibling.plain")
    else:
        with pytest.raises(AttachError, match=r"Base\.method was hooked again"):
            require_in_place("fix", "both")
