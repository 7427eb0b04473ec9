"""The numbers stock puts on the wire as a status: the adapters and interposers spell them out."""

from __future__ import annotations

import ast

import pytest

from sglang_scaling_fixes import kv_poll
from tests.contract.wheels import ARMED, source

EXPECTED = {"Failed": 0, "Bootstrapping": 1, "WaitingForInput": 2, "Transferring": 3, "Success": 4}
OURS = {
    "Failed": kv_poll.FAILED,
    "WaitingForInput": kv_poll.WAITING,
    "Transferring": kv_poll.TRANSFERRING,
    "Success": kv_poll.SUCCESS,
}


@pytest.mark.parametrize("release", ARMED)
def test_kv_poll_values(release: str) -> None:
    tree = ast.parse((source(release) / "sglang/srt/disaggregation/base/conn.py").read_text())
    poll = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "KVPoll")
    values = {
        n.targets[0].id: n.value.value
        for n in poll.body
        if isinstance(n, ast.Assign)
        and isinstance(n.targets[0], ast.Name)
        and isinstance(n.value, ast.Constant)
    }
    assert values == EXPECTED
    assert OURS.items() <= values.items()
