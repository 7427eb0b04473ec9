"""The functions of sgl_kernel's CPU build that speculative decoding calls, in plain PyTorch.

Named and called as in SGLang 0.5.23 (sglang/kernels/ops/speculative, mem_cache/allocation);
each writes into the tensors it is given. b requests, n draft tokens each, the first of them
the token that is already certain (the tree's root).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_QLEN_ONLY = 1  # the tree mask mode stock chooses on a CPU


def assign_req_to_token_pool_cpu(
    requests: Any, req_to_token: Any, start: Any, end: Any, slots: Any, _width: int
) -> None:
    """Enter each request's new slots: req_to_token[request, start:end], packed in `slots`."""
    for row, first, last, packed in _ranges(requests, start, end):
        req_to_token[row, first:last] = slots[packed].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    requests: Any, req_to_token: Any, start: Any, end: Any, slots: Any, _width: int
) -> None:
    """The other way: pack each request's slots start:end into `slots`."""
    for row, first, last, packed in _ranges(requests, start, end):
        slots[packed] = req_to_token[row, first:last].to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    requests: Any,
    req_to_token: Any,
    lengths: Any,
    slots: Any,
    _width: int,
    topk: int,
    steps: int,
) -> None:
    """Pack the topk * steps slots behind each request's tokens into `slots`."""
    assign_extend_cache_locs_cpu(
        requests, req_to_token, lengths, lengths + topk * steps, slots, _width
    )


def _ranges(requests: Any, start: Any, end: Any) -> Iterator[tuple[int, int, int, slice]]:
    at = 0
    for row, first, last in zip(requests.tolist(), start.tolist(), end.tolist(), strict=True):
        yield row, first, last, slice(at, at + last - first)
        at += last - first


def fill_bonus_tokens_cpu(accepted: Any, lengths: Any, bonus: Any, stride: int) -> None:
    """The last accepted token of each request; `lengths` counts it."""
    rows = accepted.view(-1, stride)
    bonus.copy_(rows.gather(1, (lengths.view(-1, 1) - 1).long()).view_as(bonus))


def fill_accept_out_cache_loc_cpu(accept_index: Any, slots: Any, accepted: Any) -> None:
    """Pack the slots of accepted tokens (-1: not accepted), in order."""
    kept = accept_index[accept_index != -1].long()
    accepted[: len(kept)] = slots[kept]


def rotate_input_ids_cpu(ids: Any, start: Any, lengths: Any, new: Any, last: Any = None) -> None:
    """Shift each request's ids left by one and put its new token at the end (or at `last`)."""
    for i, (first, length) in enumerate(zip(start.tolist(), lengths.tolist(), strict=True)):
        if length == 0:
            continue
        ids[first : first + length - 1] = ids[first + 1 : first + length].clone()
        ids[int(last[i]) if last is not None else first + length - 1] = new[i]


def build_tree_kernel_efficient_cpu(
    parent_list: Any,
    selected: Any,
    lengths: Any,
    mask: Any,
    positions: Any,
    index: Any,
    next_token: Any,
    next_sibling: Any,
    topk: int,
    _depth: int,
    draft: int,
    mode: int,
) -> None:
    """Draft trees as links (first child, next sibling), positions and an ancestor mask."""
    if int(mode) != _QLEN_ONLY:
        raise NotImplementedError(f"tree mask mode {mode} has no CPU stand-in in the lab")
    for b, length in enumerate(lengths.tolist()):
        parents = _parents(selected[b].tolist(), parent_list[b].tolist(), topk, draft)
        rows = mask.view(-1, draft, draft)[b]
        rows[:] = False
        first_child = [-1] * draft
        sibling = [-1] * draft
        depth = [0] * draft
        for i in range(draft):
            node: int | None = i
            while node is not None:
                rows[i, node] = True
                node = parents[node]
                depth[i] += node is not None
        for i in range(draft - 1, 0, -1):
            parent = parents[i]
            assert parent is not None
            sibling[i], first_child[parent] = first_child[parent], i
        index.view(-1, draft)[b] = _like(index, range(b * draft, (b + 1) * draft))
        next_token.view(-1, draft)[b] = _like(next_token, first_child)
        next_sibling.view(-1, draft)[b] = _like(next_sibling, sibling)
        positions.view(-1, draft)[b] = _like(positions, (length + d for d in depth))


def _parents(
    selected: list[int], parent_list: list[int], topk: int, draft: int
) -> list[int | None]:
    """Each draft token's parent among them; the root has none."""
    parents: list[int | None] = [None]
    for i in range(1, draft):
        branch = selected[i - 1] // topk
        parents.append(0 if branch == 0 else selected.index(parent_list[branch]) + 1)
    return parents


def _like(tensor: Any, values: Any) -> Any:
    import torch

    return torch.tensor(list(values), dtype=tensor.dtype)


def verify_tree_greedy_cpu(
    *,
    predicts: Any,
    accept_index: Any,
    accept_token_num: Any,
    candidates: Any,
    retrive_index: Any,  # spelt so by the caller
    retrive_next_token: Any,
    retrive_next_sibling: Any,
    target_predict: Any,
) -> None:
    """Walk down each tree as long as a child is what the target would have said."""
    target = target_predict.view(-1).tolist()
    for b, (tokens, index, child, sibling) in enumerate(
        zip(
            candidates.tolist(),
            retrive_index.tolist(),
            retrive_next_token.tolist(),
            retrive_next_sibling.tolist(),
            strict=True,
        )
    ):
        accepted, node = [index[0]], child[0]
        while node != -1 and len(accepted) < accept_index.shape[1]:
            said = target[accepted[-1]]
            while node != -1 and tokens[node] != said:
                node = sibling[node]
            if node == -1:
                break
            predicts[accepted[-1]] = said
            accepted.append(index[node])
            node = child[node]
        predicts[accepted[-1]] = target[accepted[-1]]
        accept_index[b, : len(accepted)] = _like(accept_index, accepted)
        accept_token_num[b] = len(accepted) - 1


FUNCTIONS = {
    function.__name__: function
    for function in (
        assign_req_to_token_pool_cpu,
        assign_extend_cache_locs_cpu,
        assign_draft_cache_locs_contiguous_cpu,
        fill_bonus_tokens_cpu,
        fill_accept_out_cache_loc_cpu,
        rotate_input_ids_cpu,
        build_tree_kernel_efficient_cpu,
        verify_tree_greedy_cpu,
    )
}
