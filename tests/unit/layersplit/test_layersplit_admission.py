"""Which requests may share a scratch, and that the others wait without being refused."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_scaling_fixes import attach
from sglang_scaling_fixes.layersplit import admission, points, tree
from sglang_scaling_fixes.layersplit.admission import Admission
from sglang_scaling_fixes.layersplit.scratch import Size
from sglang_scaling_fixes.layersplit.tree import Path
from tests.layersplit.stand_ins import PAGE, Pool, module, pool_module
from tests.layersplit.trees import Asked, requests


def admitted(room: Admission, asked: list[Asked]) -> list[int]:
    """As stock does it: in order, up to the first that does not fit."""
    taken = []
    for name, request in enumerate(asked):
        if not room.fits(request.tokens, request.path):
            break
        room.take(request.tokens, request.path)
        taken.append(name)
    return taken


def overrun(asked: list[Asked], taken: list[int], size: Size) -> bool:
    pages = set().union(*(asked[name].pages(name) for name in taken))
    return len(taken) > 1 and (len(pages) > size.prefix or len(taken) > size.requests)


sizes = st.builds(Size, st.integers(1, 40), st.just(8), st.integers(1, 6))


@given(requests(), sizes)
def test_what_is_admitted_fits(asked: list[Asked], size: Size) -> None:
    taken = admitted(Admission(size, PAGE), asked)
    assert taken[:1] == [0]  # alone it always fits
    assert not overrun(asked, taken, size)
    again = [dataclasses.replace(request) for request in asked]
    assert admitted(Admission(size, PAGE), again) == taken  # as on another rank


@given(requests())
def test_pages_in_the_tree_count_once(asked: list[Asked]) -> None:
    pages = len(set().union(*(request.pages(name) for name, request in enumerate(asked))))
    exactly = Size(pages, 8, len(asked))
    assert len(admitted(Admission(exactly, PAGE), asked)) == len(asked)


class Lax(Admission):
    def fits(self, tokens: int, path: Path) -> bool:
        return True


class SharesTooMuch(Admission):
    """Takes the deepest node that anybody has for one that this request has."""

    def _needed(self, tokens: int, path: Path) -> int:
        return super()._needed(tokens, [(node, tokens) for node in self._covered._tokens])


TWO = [Asked([(0, 3 * PAGE)], 0), Asked([(1, 3 * PAGE)], 0)]


@pytest.mark.parametrize("kind", [Lax, SharesTooMuch])
def test_control_an_admission_that_overruns_is_found(kind: type[Admission]) -> None:
    size = Size(5, 8, 4)
    assert admitted(Admission(size, PAGE), TWO) == [0]
    assert overrun(TWO, admitted(kind(size, PAGE), TWO), size)


def test_a_node_that_both_have_counts_once_and_a_partly_filled_page_whole() -> None:
    room = Admission(Size(7, 8, 4), PAGE)
    room.take(3 * PAGE + 1, [(1, 2 * PAGE), (0, PAGE)])
    assert room.fits(4 * PAGE, [(0, PAGE)])
    assert not room.fits(4 * PAGE, [(2, PAGE)])


def test_a_prefix_that_was_cut_covers_no_more_than_itself() -> None:
    """The second request needs the five pages behind it, though its nodes are the first one's."""
    path = [(7, 9 * PAGE)]
    for pages, joins in ((8, False), (9, True)):
        room = Admission(Size(pages, 8, 4), PAGE)
        room.take(4 * PAGE, path)
        assert room.fits(9 * PAGE, path) == joins


# -- stock's adder -------------------------------------------------------------------------


class Result(enum.Enum):
    CONTINUE = enum.auto()
    NO_TOKEN = enum.auto()
    OTHER = enum.auto()


@dataclass(eq=False)
class Node:
    key: list[int] = field(default_factory=list)
    parent: Node | None = None


ROOT = Node()


def node(pages: int, parent: Node = ROOT) -> Node:
    return Node([0] * (pages * PAGE), parent)


def request(pages: int, last: Node | int = ROOT, on_host: int = 0, refused: bool = False) -> Any:
    """`pages`: of its prefix on the device. `on_host`: pages that a load brings there."""
    return SimpleNamespace(
        prefix_len=pages * PAGE,
        last_node=last,
        host_hit_length=on_host * PAGE,
        refused=refused,
        loaded=False,
    )


class PrefillAdder:
    tree_cache: Any = None

    def __init__(self) -> None:
        self.can_run_list: list[Any] = []

    def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int) -> Result:
        if req.refused:
            return Result.NO_TOKEN
        req.loaded = True
        req.prefix_len += req.host_hit_length
        self.can_run_list.append(req)
        return Result.CONTINUE

    def add_chunked_req(self, req: Any) -> Any:
        self.can_run_list.append(req)
        return req


@pytest.fixture
def adder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    """Stock's class with our wrappers."""
    kind = type("PrefillAdder", (), dict(vars(PrefillAdder)))
    name = points.ADD_REQUEST.target.partition(":")[0]
    module(monkeypatch, name, PrefillAdder=kind, AddReqResult=Result)
    pool_module(monkeypatch)
    admission.attach()
    yield kind
    attach.unwrap([points.ADD_REQUEST, points.ADD_CHUNKED])


def add(adder: Any, req: Any) -> Result:
    result: Result = adder.add_one_req(req, False, None)
    return result


def served(kind: type[Any], waiting: list[Any]) -> list[list[Any]]:
    """Batches until nobody waits, as stock puts them together."""
    batches = []
    while waiting:
        batch = kind()
        for req in waiting:
            if add(batch, req) is not Result.CONTINUE:
                break
        assert batch.can_run_list, "somebody waits for ever"
        waiting = waiting[len(batch.can_run_list) :]
        batches.append(batch.can_run_list)
    return batches


def test_three_long_requests_over_a_scratch_of_one(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    long = [request(9) for _ in range(3)]
    assert served(adder, long) == [[one] for one in long]
    assert pool.stats.report()["deferred"] == 2


def test_control_without_admission_they_are_one_batch() -> None:
    long = [request(9) for _ in range(3)]
    assert served(PrefillAdder, long) == [long]


def test_what_does_not_fit_waits_before_stock_loads_it(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    batch, loads = adder(), request(3, on_host=6)
    assert add(batch, request(2)) is Result.CONTINUE
    assert add(batch, loads) is Result.OTHER
    assert not loads.loaded and batch.can_run_list != [loads]
    assert add(batch, request(8)) is Result.CONTINUE  # nothing was counted for it
    assert pool.stats.report()["deferred"] == 1


def test_what_was_loaded_counts(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    batch = adder()
    assert add(batch, request(3, on_host=6)) is Result.CONTINUE
    assert add(batch, request(2)) is Result.OTHER
    assert pool.stats.report()["deferred"] == 1


def test_the_chunked_request_comes_first_and_counts(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    batch, chunked = adder(), request(30)
    assert batch.add_chunked_req(chunked) is chunked
    assert add(batch, request(1)) is Result.OTHER
    small = adder()
    small.add_chunked_req(request(4))
    assert add(small, request(6)) is Result.CONTINUE
    assert add(small, request(1)) is Result.OTHER
    assert pool.stats.report()["deferred"] == 2


def test_whom_stock_refuses_is_not_counted(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    batch = adder()
    assert add(batch, request(9, refused=True)) is Result.NO_TOKEN
    assert add(batch, request(9)) is Result.CONTINUE
    assert pool.stats.report()["deferred"] == 0


def test_pages_that_two_requests_share_in_the_tree_count_once(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    shared = node(6)
    batch = adder()
    assert add(batch, request(8, node(2, shared))) is Result.CONTINUE
    assert add(batch, request(8, node(2, shared))) is Result.CONTINUE
    assert add(batch, request(8, node(2, shared))) is Result.OTHER
    assert pool.stats.report()["deferred"] == 1


class Core:
    """A tree core whose nodes are numbers, as UnifiedRadixCache's are."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    def number(self, node: Node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1

    def node_by_id(self, number: int) -> Node:
        return self._nodes[number]


class Paths(Core):
    """It says the way to a node, root first."""

    def collect_path_info(self, numbers: list[int]) -> list[list[Any]]:
        (number,) = numbers
        nodes = tree.path(None, self._nodes[number])
        return [[SimpleNamespace(node_id=n, path_end=end) for n, end in reversed(nodes)]]


class Silent(Core):
    def node_by_id(self, number: int) -> Node:
        raise NotImplementedError


@pytest.mark.parametrize(("core", "joins"), [(Core(), True), (Paths(), True), (Silent(), False)])
def test_pages_are_shared_in_a_tree_of_numbers(adder: type[Any], core: Core, joins: bool) -> None:
    """And where the core says no path, they count for each: never too little."""
    pool = Pool(Size(prefix=10, chunk=8))
    shared = node(6)
    batch = adder()
    batch.tree_cache = SimpleNamespace(tree_core=core)
    for expected in (True, joins):
        req = request(8, core.number(node(2, shared)))
        assert (add(batch, req) is Result.CONTINUE) == expected
    assert pool.stats.report()["deferred"] == (not joins)


def test_before_0_5_22_a_prefix_is_its_slots(adder: type[Any]) -> None:
    pool = Pool(Size(prefix=10, chunk=8))
    batch = adder()
    first, second = request(0), request(0)
    for req in (first, second):
        del req.prefix_len
        req.prefix_indices = range(9 * PAGE)
    batch.add_chunked_req(first)
    assert add(batch, second) is Result.OTHER
    assert pool.stats.report()["deferred"] == 1


def test_without_a_split_pool_stock_decides_alone(adder: type[Any]) -> None:
    batch = adder()
    for _ in range(3):
        assert add(batch, request(10**6)) is Result.CONTINUE
