"""What moves bytes: the owner's copy, its kernel, moved index keys; and how large a scratch is."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sglang_scaling_fixes.layersplit import scratch
from sglang_scaling_fixes.layersplit.moves import move_index_keys
from sglang_scaling_fixes.layersplit.pack import pack
from sglang_scaling_fixes.paths import ROOT
from tests import child

PAGES, PAGE = 9, 4
PICKED = torch.tensor([7, 0, 3, 3])


def drawn(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(len(shape)))
    return values.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 576), (torch.uint8, 656), (torch.float8_e4m3fn, 576)]
)
@pytest.mark.parametrize("with_index", [True, False])
def test_an_owner_copies_the_pages_of_the_plan(
    dtype: torch.dtype, dim: int, with_index: bool
) -> None:
    kv = drawn(PAGES, PAGE, 1, dim, dtype=dtype)
    index = drawn(PAGES, PAGE * 132)
    kv_to = torch.zeros(len(PICKED), PAGE, 1, dim, dtype=dtype)
    index_to = torch.zeros(len(PICKED), PAGE * 132, dtype=torch.uint8)
    pack(PICKED, kv, kv_to, index if with_index else index[:0], index_to)
    assert torch.equal(kv_to.view(torch.uint8), kv.view(torch.uint8)[PICKED])
    assert torch.equal(index_to, index[PICKED] if with_index else torch.zeros_like(index_to))


def test_no_page_is_no_copy() -> None:
    kv = drawn(PAGES, PAGE, 1, 8)
    before = kv.clone()
    pack(PICKED[:0], kv, kv[:0], kv[:0], kv[:0])
    assert torch.equal(kv, before)


KERNEL = """
import json
import torch
from sglang_scaling_fixes.layersplit.pack import launch

draw = torch.Generator().manual_seed(1)
def words(pages, of_a_page):
    return torch.randint(-2**31, 2**31 - 1, (pages, of_a_page), generator=draw, dtype=torch.int32)

pages = torch.tensor([7, 0, 3])
found = {}
cases = [("one block", 64, 33), ("some", 2500, 1100), ("no index", 1025, 0)]
for name, kv_words, index_words in cases:
    kv, index = words(9, kv_words), words(9 if index_words else 0, index_words)
    kv_to, index_to = torch.zeros(3, kv_words).int(), torch.zeros(3, index_words).int()
    launch(pages, kv, kv_to, index, index_to)
    same = torch.equal(kv_to, kv[pages])
    found[name] = same and (not index_words or torch.equal(index_to, index[pages]))
    found[name + ", other pages"] = torch.equal(kv_to, kv[pages + 1])
print("found:" + json.dumps(found))
"""


def test_the_kernel_copies_the_same() -> None:
    """Interpreted: what it addresses is shown, how fast it is and 64 bits are not."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    found = child.said(sys.executable, KERNEL, env=env, mark="found:")
    assert found == {
        f"{name}{other}": not other
        for name in ("one block", "some", "no index")
        for other in ("", ", other pages")
    }


KEY, SCALE = 8, 4


def index_layer() -> Tensor:
    return drawn(PAGES, PAGE * (KEY + SCALE))


def of_token(index: Tensor, slot: int) -> tuple[Tensor, Tensor]:
    """Key and scale of a token: a page holds all its keys, then all its scales."""
    page, place = index[slot // PAGE], slot % PAGE
    scales = PAGE * KEY
    return (
        page[place * KEY : (place + 1) * KEY],
        page[scales + place * SCALE : scales + (place + 1) * SCALE],
    )


@given(st.permutations(range(PAGES * PAGE)), st.integers(1, PAGES * PAGE // 2))
def test_index_keys_move_token_by_token(slots: list[int], count: int) -> None:
    source, target = slots[:count], slots[count : 2 * count]
    index = index_layer()
    expected = index.clone()
    for to, of in zip(target, source, strict=True):
        for mine, theirs in zip(of_token(expected, to), of_token(index, of), strict=True):
            mine.copy_(theirs)
    move_index_keys(index, torch.tensor(target), torch.tensor(source), PAGE, KEY)
    assert torch.equal(index, expected)


def test_control_by_token_where_keys_lie_by_page() -> None:
    index = index_layer()
    slot = torch.tensor([PAGES])
    with pytest.raises(IndexError):
        index[slot - 1] = index[slot]
    move_index_keys(index, slot - 1, slot, PAGE, KEY)


def test_a_layer_of_another_rank_has_nothing_to_move() -> None:
    move_index_keys(index_layer()[:0], torch.tensor([1]), torch.tensor([2]), PAGE, KEY)


sizes = st.tuples(st.integers(1, 10**6), st.integers(1, 20000), st.integers(1, 300))


@given(sizes, st.sampled_from([1, 64]))
def test_the_least_scratch_holds_one_context_and_no_less_does(
    drawn_sizes: tuple[int, int, int], page: int
) -> None:
    context, chunk, requests = drawn_sizes
    least = scratch.least(context, chunk, requests, page)
    assert least % page == 0
    size = scratch.size(least, chunk, requests, page)
    assert size.prefix == -(-context // page)
    assert size.pages * page == least
    assert scratch.size(least - 1, chunk, requests, page).prefix <= size.prefix
    assert scratch.size(least - page, chunk, requests, page).prefix == size.prefix - 1
    assert size.chunk * page >= chunk + (page - 1) * size.requests
    assert size.requests == min(requests, scratch.REQUESTS)


def test_bytes_of_a_scratch_are_those_of_its_buffers() -> None:
    kv = torch.zeros(PAGES * PAGE, 1, 576, dtype=torch.bfloat16)
    index = torch.zeros(PAGES, PAGE * 132, dtype=torch.uint8)
    assert scratch.Scratch(kv, index).nbytes == PAGES * PAGE * (576 * 2 + 132)
