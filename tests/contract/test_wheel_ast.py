"""The resolver says no: a contract test that cannot fail proves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.contract.wheel_ast import ContractError, Wheel
from tests.contract.wheels import RELEASES

CONN = "sglang.srt.disaggregation.mooncake.conn"
MANAGER = f"{CONN}:MooncakeKVManager"


@pytest.fixture
def tree(tmp_path: Path) -> Wheel:
    """A small package with every way a name can travel."""
    files = {
        "pkg/__init__.py": "from .inner import Made as Public\n",
        "pkg/inner/__init__.py": "from pkg.inner.impl import *\n",
        "pkg/inner/impl.py": """
            import pkg.base
            from external import Foreign

            class Made(pkg.base.Right, Foreign, Generic[int]):
                field: int = 0
                def own(this, a, /, b, *rest, c, **more):
                    this.assigned, (this.pair, this.other) = 1, (2, 3)
                    del this.gone
                @staticmethod
                def static(x): ...
                if True:
                    @classmethod
                    def make(cls, y): ...

            def rebuild(cls): ...
            Made = rebuild(Made)
            class Gone: ...
            Gone = None
            """,
        "pkg/base.py": """
            class Top:
                def shared(self, top): self.from_top = 1
            class Left(Top):
                def shared(self, left): ...
            class Right(Left, Top):
                class Nested:
                    def deep(self, z): ...
            """,
        "pkg/loop.py": "from pkg.loop import Me\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indent = "            " if text.startswith("\n") else ""
        path.write_text("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return Wheel("test", tmp_path)


@pytest.mark.parametrize(
    ("target", "params", "kind"),
    [
        ("pkg:Public.own", ("a", "b", "c"), "method"),
        ("pkg.inner:Made.static", ("x",), "staticmethod"),
        ("pkg.inner.impl:Made.make", ("y",), "classmethod"),
        ("pkg:Public.shared", ("left",), "method"),
        ("pkg.base:Right.Nested.deep", ("z",), "method"),
        ("pkg.inner:rebuild", ("cls",), "function"),
        ("pkg:Public", (), "class"),
    ],
)
def test_finds(tree: Wheel, target: str, params: tuple[str, ...], kind: str) -> None:
    found = tree.find(target)
    assert (found.params, found.kind) == (params, kind)


def test_attributes_come_from_the_class_and_its_bases(tree: Wheel) -> None:
    names = {"field", "assigned", "pair", "other", "own", "make", "from_top"}
    tree.require("pkg:Public.own", uses=tuple(names))


@pytest.mark.parametrize(
    ("target", "params", "uses", "says"),
    [
        ("pkg.none:Made.own", (), (), "no module pkg.none"),
        ("pkg:Missing.own", (), (), "no class Missing"),
        ("pkg:Public.missing", (), (), "no method missing"),
        ("pkg.inner:missing", (), (), "has no missing"),
        ("pkg.inner.impl:Foreign.own", (), (), "no class Foreign"),
        ("pkg.inner.impl:Gone", (), (), "has no Gone"),
        ("pkg.loop:Me.x", (), (), "no class Me"),
        ("pkg:Public.own", ("b",), (), "takes ('a', 'b', 'c')"),
        ("pkg:Public.own", ("a", "b", "c", "d"), (), "relied on"),
        ("pkg:Public.own", (), ("gone", "field"), "no ['gone']"),
        ("pkg.inner:rebuild", (), ("field",), "no ['field']"),
    ],
)
def test_refuses(
    tree: Wheel, target: str, params: tuple[str, ...], uses: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ContractError) as caught:
        tree.require(target, params, uses)
    assert says in str(caught.value)


@pytest.mark.parametrize("release", RELEASES[-1:])
@pytest.mark.parametrize(
    ("target", "params", "uses"),
    [
        (f"{MANAGER}.transfer_loop", (), ()),
        (f"{MANAGER}.transfer_worker", ("executor", "queue"), ()),
        (f"{MANAGER}.transfer_worker", ("queue",), ("no_such_attribute",)),
        (f"{CONN}:MooncakeKVBroker.transfer_worker", (), ()),
    ],
)
def test_refuses_in_a_stock_wheel(
    wheel: Wheel, target: str, params: tuple[str, ...], uses: tuple[str, ...]
) -> None:
    with pytest.raises(ContractError):
        wheel.require(target, params, uses)


@pytest.mark.parametrize("release", RELEASES[-1:])
@pytest.mark.parametrize("method", ["transfer_worker", "update_status"])
def test_notices_a_method_renamed_upstream(wheel: Wheel, tmp_path: Path, method: str) -> None:
    """One own method of the class, one inherited from another module."""
    target = f"{MANAGER}.{method}"
    folder = "sglang/srt/disaggregation"
    shutil.copytree(wheel.root / folder, tmp_path / folder)
    renamed = Wheel("renamed", tmp_path)
    defines = renamed.find(target).module.path
    defines.write_text(defines.read_text().replace(f"def {method}(", f"def {method}_v2("))
    with pytest.raises(ContractError, match=f"no method {method}"):
        Wheel("renamed", tmp_path).require(target)
