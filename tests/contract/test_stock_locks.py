"""Every message of stock's leaves under a lock: its own, or that of our interposer.

ZMQ's sockets are not for several threads. To prefill, stock sends under the lock that it gives
with the socket. To decode, up to 0.5.16, it does not; those sockets come from the manager's
`_connect`, whose result is our `StatusInterposer`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.contract.wheels import ARMED, source

FILES = ("mooncake/conn.py", "common/conn.py", "common/staging_handler.py")
TO_PREFILL, TO_DECODE = "_connect_to_bootstrap_server", "_connect"
OWN = "prefetch_sockets[ep]"
"""Sockets that prefill's scheduler makes for itself, and no other thread has."""


def sends(text: str) -> Iterator[tuple[str, str]]:
    """(where the socket is from, the lock it is used under) for each call of `send_multipart`."""
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            yield from _of(function)


def _of(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    made: dict[str, tuple[str, str]] = {}
    """Socket -> what made it, and the lock that came with it."""

    def visit(node: ast.AST, held: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not function:
            return
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            maker = ast.unparse(node.value.func).rpartition(".")[2]
            names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
            if maker in (TO_PREFILL, TO_DECODE) and names:
                made[names[0]] = maker, names[1] if len(names) > 1 else ""
        if isinstance(node, ast.With):
            held = (*held, *(ast.unparse(item.context_expr) for item in node.items))
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr == "send_multipart":
            yield _said(called.value, held)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, held)

    def _said(socket: ast.expr, held: tuple[str, ...]) -> tuple[str, str]:
        if isinstance(socket, ast.Call):
            return ast.unparse(socket.func).rpartition(".")[2], ""
        maker, lock = made.get(ast.unparse(socket), (ast.unparse(socket), ""))
        return maker, lock if lock in held else ""

    yield from visit(function, ())


@pytest.mark.parametrize("release", ARMED)
def test_every_send_of_stocks_is_under_a_lock(release: str) -> None:
    package = source(release) / "sglang/srt/disaggregation"
    found = [sent for name in FILES for sent in sends((package / name).read_text())]
    assert {maker for maker, _ in found} <= {TO_PREFILL, TO_DECODE, OWN}
    assert (TO_PREFILL, "lock") in found
    assert (TO_PREFILL, "") not in found, "a message to prefill without stock's lock"
    assert any(maker == TO_DECODE for maker, _ in found), "the pattern still matches"


def test_the_pattern_would_notice() -> None:
    bare = "def f(self):\n    sock, lock = self._connect_to_bootstrap_server(i)\n    "
    assert list(sends(bare + "sock.send_multipart(x)")) == [(TO_PREFILL, "")]
    assert list(sends(bare + "with lock:\n        sock.send_multipart(x)")) == [
        (TO_PREFILL, "lock")
    ]
    assert list(sends("def f(self):\n    self._connect(e).send_multipart(x)")) == [(TO_DECODE, "")]
