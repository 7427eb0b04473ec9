"""What requests of a batch share, from the tree alone: no page too little, and none twice."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes.layersplit import plan, points, sharing
from sglang_scaling_fixes.layersplit.scratch import Size
from tests.layersplit.stand_ins import PAGE, Pool, module, pool_module
from tests.layersplit.trees import Asked, requests


def planned(asked: list[Asked], shared: list[int] | None) -> plan.Plan:
    """Of requests whose pages lie in the pool in the order in which the tree has them."""
    number: dict[tuple[str, int, int], int] = {}
    prefixes = [request.tokens for request in asked]
    table = torch.zeros((len(asked), max(prefixes) + PAGE), dtype=torch.int32)
    for row, request in enumerate(asked):
        in_order = sorted(request.pages(row), key=lambda page: order(request, page))
        pages = [number.setdefault(page, 1 + len(number)) for page in in_order]
        pages.append(number.setdefault(("new", row, 0), 1 + len(number)))
        slots = (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()
        table[row, : prefixes[row] + 1] = slots[: prefixes[row] + 1].int()
    return plan.make(
        table,
        torch.arange(len(asked)),
        prefixes,
        [prefix + 1 for prefix in prefixes],
        page_size=PAGE,
        pool_pages=2 + len(number),
        room=10**6,
        shared=shared,
    )


def order(request: Asked, page: tuple[str, int, int]) -> int:
    kind, _, index = page
    return index if kind == "node" else index + 10**6


def told(asked: list[Asked]) -> list[int] | None:
    paths = [request.path for request in asked]
    return sharing.shared_pages(paths, [request.tokens for request in asked], PAGE)


def as_if_own(asked: list[Asked]) -> list[Asked]:
    """With a path for each, as stock's tree has one for all that it holds."""
    ends = [request.path or [(1000 + name, 0)] for name, request in enumerate(asked)]
    return [Asked(path, request.own) for path, request in zip(ends, asked, strict=True)]


@given(requests())
def test_what_the_tree_says_is_what_the_pages_say(asked: list[Asked]) -> None:
    asked = as_if_own(asked)
    shared = told(asked)
    assert shared is not None
    by_tree, by_pages = planned(asked, shared), planned(asked, None)
    assert sorted(by_tree.prefix.tolist()) == sorted(set(by_pages.prefix.tolist()))
    assert sorted(by_tree.pages.tolist()) == sorted(by_pages.pages.tolist())


@given(requests(), st.data())
def test_control_a_page_too_many_is_noticed_on_the_device(
    asked: list[Asked], data: st.DataObject
) -> None:
    """Whether or not another request has it: only what nobody sends may be noticed."""
    asked = as_if_own(asked)
    shared = told(asked)
    assert shared is not None
    liar = data.draw(st.sampled_from(range(len(asked))))
    if shared[liar] == -(-asked[liar].tokens // PAGE):
        return
    sent = set(planned(asked, shared).prefix.tolist())
    shared[liar] += 1
    try:
        made = planned(asked, shared)
    except RuntimeError as error:
        assert "shared page is missing" in str(error)
    else:
        assert set(made.prefix.tolist()) == sent  # a later request sends it


def test_a_page_that_two_prefixes_fill_partly_is_sent_for_each() -> None:
    """Twice rather than never: a node of the tree may end within a page."""
    path = [(7, PAGE + 3)]
    assert sharing.shared_pages([path, path], [PAGE + 3] * 2, PAGE) == [0, 1]


def test_a_prefix_that_was_cut_covers_no_more_than_itself() -> None:
    path = [(7, 9 * PAGE)]
    assert sharing.shared_pages([path] * 3, [4 * PAGE, 9 * PAGE, 9 * PAGE], PAGE) == [0, 4, 9]


def test_a_tree_that_cannot_say_is_not_believed() -> None:
    path = [(7, 9 * PAGE)]
    assert sharing.shared_pages([path, []], [PAGE, PAGE], PAGE) is None
    assert sharing.shared_pages([path, []], [PAGE, 0], PAGE) == [0, 0]


class Node:
    def __init__(self, tokens: int, parent: Node | None) -> None:
        self.key, self.parent = range(tokens), parent


class Batch:
    """Stock's, of requests that have all lain in the tree."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = nodes
        self.tree_cache = SimpleNamespace()
        self.reqs: list[Any] = []

    def prepare_for_extend(self) -> None:
        self.prefix_lens = [len(node.key) for node in self.nodes]
        self.reqs = [
            SimpleNamespace(rid=f"r{number}", last_node=node)
            for number, node in enumerate(self.nodes)
        ]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    pool_module(monkeypatch)
    name, _, _ = points.PREPARE.target.partition(":")
    stock = type("ScheduleBatch", (Batch,), {"prepare_for_extend": Batch.prepare_for_extend})
    module(monkeypatch, name, ScheduleBatch=stock)
    sharing.attach()
    return Pool(Size(9, 9))


def prepared(*nodes: Node) -> Batch:
    name, _, _ = points.PREPARE.target.partition(":")
    batch: Batch = sys.modules[name].ScheduleBatch(*nodes)
    batch.prepare_for_extend()
    return batch


def test_a_pass_takes_what_was_found_for_its_batch_and_takes_it_once(pool: Pool) -> None:
    node = Node(3 * PAGE, Node(0, None))
    prepared(node, node)
    asked = ["r0", "r1"], [3 * PAGE, 3 * PAGE]
    assert pool.sharing.take(*asked) == [0, 3]
    assert pool.sharing.take(*asked) is None


@pytest.mark.parametrize(
    ("rids", "prefixes"),
    [
        (["r1", "r0"], [3 * PAGE, 3 * PAGE]),
        (["r0", "r1"], [3 * PAGE, 2 * PAGE]),
        (["r0", "r1", "r2"], [3 * PAGE, 3 * PAGE, 0]),
        (None, [3 * PAGE, 3 * PAGE]),
    ],
)
def test_another_pass_takes_nothing(
    pool: Pool, rids: list[str] | None, prefixes: list[int]
) -> None:
    node = Node(3 * PAGE, Node(0, None))
    prepared(node, node)
    assert pool.sharing.take(rids, prefixes) is None


def test_a_batch_with_one_prefix_asks_no_tree(pool: Pool) -> None:
    prepared(Node(3 * PAGE, None), Node(0, None))
    assert pool.sharing.take(["r0", "r1"], [3 * PAGE, 0]) is None
