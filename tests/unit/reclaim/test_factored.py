"""Three requests at two prefill ranks, completely; and that nothing is left out on the way."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.model.explore import CONTROLS, SMALL, is_harm, reached
from tests.model.factored import QUICK_S, Nodes, explore_factored
from tests.model.world import Config, Met

Keys = set[tuple[Any, ...]]


@pytest.mark.parametrize("name", QUICK_S)
def test_every_interleaving_is_safe_and_ends(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    found = explore_factored(QUICK_S[name])
    record_property("explored", f"{name}: {found}")
    assert not found.violation, "\n".join((found.violation, *found.trace))
    assert found.complete
    assert found.terminal > 0


# That an owner waits in vain is said of one world at a time: it is no end of a node.
@pytest.mark.parametrize("name", [name for name in CONTROLS if CONTROLS[name].tells])
def test_without_one_rule_the_corruption_is_found(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    ranks = 2 if CONTROLS[name].greeted else 1  # two take half a minute to find it
    found = explore_factored(replace(CONTROLS[name], prefills=ranks))
    record_property("explored", f"{name}, ranks: {ranks}: found after {found}")
    print("\n".join((found.violation, *found.trace)))
    assert found.violation.startswith("Violation: ")
    assert is_harm(CONTROLS[name], found.violation)


@pytest.mark.parametrize(
    "name",
    [
        "one request, dup",
        "failed write, unnoticed",
        "room reuse, failed write",
        "crash, dup",
        "two writers, one silent",
        "decode without the plugin, later",
        "unknown peer, stock lags",
        "stock prefill, decode's stock lags",
    ],
)
def test_it_is_the_same_worlds_as_one_by_one(name: str) -> None:
    """The worlds themselves, not their number: none is lost, none is made up."""
    assert in_nodes(SMALL[name]) == one_by_one(SMALL[name])


@pytest.mark.parametrize("mishaps", ["fail", "swap"])
def test_it_is_the_same_worlds_with_two_ranks(mishaps: str) -> None:
    once: dict[str, Any] = dict.fromkeys(mishaps.split(), 1)
    config = Config(prefills=2, **once)
    assert in_nodes(config) == one_by_one(config)


def test_of_requests_that_are_alike_the_first_stands_for_all() -> None:
    """Each world with its requests renamed in all ways gives all the worlds there are."""
    config = Config(rooms=(7, 8), slots=1)
    every, some = in_nodes(config), in_nodes(config, symmetric=True)
    n = len(config.rooms)
    exposed = Counter(sum(state != "new" for state in world[0]) for world in some)
    assert some < every
    assert sum(count * math.perm(n, k) for k, count in exposed.items()) == len(every)


def one_by_one(config: Config) -> Keys:
    """Every world there is, as `explore` visits them."""
    met: Met = {}
    return spelled(reached(config, met), config, met)


def in_nodes(config: Config, *, symmetric: bool = False) -> Keys:
    """Every world of every node."""
    nodes = Nodes(config, symmetric=symmetric)
    seen = {nodes.start}
    queue = deque([nodes.start])
    worlds = set()
    while queue:
        node = queue.popleft()
        worlds |= set(nodes.worlds(node))
        for _, following in nodes.moves(node):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return spelled({nodes.world(parts).key(nodes.met) for parts in worlds}, config, nodes.met)


def spelled(keys: Keys, config: Config, met: Met) -> Keys:
    """Keys with the ranks' states in place of their numbers, which depend on who came first."""
    states = {rank.number: state for state, rank in met.items()}
    ranks = config.decodes + config.prefills
    return {(*key[:-ranks], *(states[number] for number in key[-ranks:])) for key in keys}
