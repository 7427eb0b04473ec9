"""The nodes in which a request's prefix lies, in each kind of tree that stock has.

    kind                                        a request's last node    who says the way to it
    RadixCache, HiRadixCache                    an object                its `parent`, and theirs
    UnifiedRadixCache, from 0.5.22              a number                 `collect_path_info`
    before, with its core in Python             a number                 `node_by_id`, then objects
    before, with its core in Rust               a number                 nobody
    no tree                                     nothing                  nobody

UnifiedRadixCache is the tree unless told otherwise from 0.5.19 on. Where nobody can
say, a prefix counts as if it were shared with nobody: a batch may close early, and never overruns.
"""

from __future__ import annotations

from typing import Any

Path = list[tuple[int, int]]
"""`(node, tokens from the root to its end)`, deepest first."""


def path(tree: Any, last: Any) -> Path:
    """The nodes of `tree` (stock's `tree_cache`) from `last` (a request's `last_node`) to the root.

    Only nodes of the device's tree: pages that are still on the host get pages of their own.
    """
    core = getattr(tree, "tree_core", None)
    if core is not None and isinstance(last, int):
        if hasattr(core, "collect_path_info"):
            (nodes,) = core.collect_path_info([last])
            return [(node.node_id, node.path_end) for node in reversed(nodes)]
        try:
            last = core.node_by_id(last)
        except NotImplementedError:  # the tree core in Rust, before it could say paths
            return []
    return _of_objects(last)


def _of_objects(node: Any) -> Path:
    nodes = []
    while node is not None and getattr(node, "parent", None) is not None:
        nodes.append((id(node), len(node.key)))
        node = node.parent
    end = sum(length for _, length in nodes)
    found = []
    for identity, length in nodes:
        found.append((identity, end))
        end -= length
    return found
