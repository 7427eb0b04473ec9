"""What `reclaim.coverage` is told holds in every wheel: chunks, senders, and who sends no KV."""

from __future__ import annotations

import ast

import pytest

from tests.contract import wheels

DISAGGREGATION = "sglang/srt/disaggregation"


def module(release: str, path: str) -> ast.Module:
    return ast.parse((wheels.source(release) / DISAGGREGATION / path).read_text())


def classes(release: str, name: str) -> list[ast.ClassDef]:
    folder = wheels.source(release) / DISAGGREGATION
    files = [folder / "mooncake/conn.py", *sorted((folder / "common").glob("*.py"))]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]


def fields(node: ast.ClassDef) -> set[str]:
    return {
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


@pytest.mark.parametrize("release", wheels.ARMED)
def test_a_chunk_says_its_pages_and_whether_it_is_the_last(release: str) -> None:
    (chunk,) = classes(release, "TransferKVChunk")
    assert {"prefill_kv_indices", "is_last_chunk"} <= fields(chunk)


@pytest.mark.parametrize("release", wheels.ARMED)
def test_a_chunk_is_the_last_when_all_pages_were_handed_over(release: str) -> None:
    """So a success always comes behind all pages that stock meant to send."""
    found = [
        ast.unparse(node)
        for file in ("mooncake/conn.py", "common/conn.py")
        for node in ast.walk(module(release, file))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("is_last_chunk")
    ]
    assert "is_last_chunk = self.curr_idx == self.num_kv_indices" in found


@pytest.mark.parametrize("release", wheels.ARMED)
def test_kv_leaves_by_one_method_that_knows_the_request(release: str) -> None:
    """`PrefillGuard.computes` hangs there: `sender.send` knows no request."""
    functions = {
        node.name: ast.unparse(node)
        for node in ast.walk(module(release, "prefill.py"))
        if isinstance(node, ast.FunctionDef)
    }
    inner = "_send_kv_chunk"  # since 0.5.21
    sends = {name for name, text in functions.items() if "sender.send(" in text}
    assert sends in ({"send_kv_chunk"}, {inner})
    callers = {name for name, text in functions.items() if f"self.{inner}(" in text}
    assert callers == ({"send_kv_chunk"} if inner in functions else set())


@pytest.mark.parametrize("release", wheels.ARMED)
def test_a_sender_is_told_pages_and_state_rows_by_position(release: str) -> None:
    (sender,) = classes(release, "MooncakeKVSender")
    (send,) = [n for n in sender.body if isinstance(n, ast.FunctionDef) and n.name == "send"]
    assert [arg.arg for arg in send.args.args][:3] == ["self", "kv_indices", "state_indices"]


@pytest.mark.parametrize("release", wheels.ARMED)
def test_who_sends_no_kv_is_asked_of_stock_itself(release: str) -> None:
    """The worker sends no KV where `layout.sends_kv` says so.

    Nor does it to a rank of a decode with context parallelism that gets no token of a chunk:
    such a decode runs without the plugin, and C3 is not asked of it.
    """
    (manager,) = classes(release, "MooncakeKVManager")
    functions = {n.name: n for n in manager.body if isinstance(n, ast.FunctionDef)}
    worker = ast.unparse(functions["transfer_worker"])
    asks = "_get_dsa_cache_transfer_skip_flags" in worker
    assert asks == ("_get_dsa_cache_transfer_skip_flags" in functions)
    if asks:
        assert "skip_kv, skip_state = self._get_dsa_cache_transfer_skip_flags(" in worker
