"""Corruption that a request's id asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from sglang_scaling_fixes.lab.faults import corrupt  # noqa: E402


def test_an_id_says_what_to_corrupt() -> None:
    assert corrupt.parse("corrupt:noise:0.5:40:x") == ("noise", 0.5, 40)


@pytest.mark.parametrize(
    "rid",
    ["corrupt:", "corrupt:noise:1", "corrupt:ink:1:0", "corrupt:zero:2:0", "corrupt:zero:1:x"],
)
def test_an_id_that_does_not_say_it(rid: str) -> None:
    with pytest.raises(ValueError, match="does not say what to corrupt"):
        corrupt.parse(rid)


def test_corruption_waits_for_its_time_and_leaves_the_rest() -> None:
    pool = SimpleNamespace(kv_buffer=[torch.ones(8, 1, 4), torch.ones(8, 1, 4)])
    slots, corruptor = torch.arange(1, 7), corrupt.Corruptor()
    corruptor.visit("corrupt:zero:0.5:2", slots[:4], pool)
    corruptor.visit("other", slots, pool)
    assert all(buffer.all() for buffer in pool.kv_buffer)
    corruptor.visit("corrupt:zero:0.5:2", slots, pool)
    for buffer in pool.kv_buffer:
        assert buffer[:, 0, 0].tolist() == [1, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["noise", "mixed"])
def test_the_same_id_is_corrupted_alike(kind: str) -> None:
    """Whatever was drawn before."""
    found = []
    for number, name in enumerate(("a", "a", "b")):
        torch.manual_seed(number)
        rows = torch.arange(64.0).view(16, 1, 4) + 1
        pool = SimpleNamespace(kv_buffer=[rows])
        corrupt.Corruptor().visit(f"corrupt:{kind}:1:0:{name}", torch.arange(16), pool)
        found.append(rows)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
