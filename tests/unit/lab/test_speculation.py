"""The stand-ins for sgl_kernel's speculative functions, on trees small enough to read."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sglang_scaling_fixes.lab.standins import speculation  # noqa: E402


def build(selected: list[int], parents: list[int], topk: int, draft: int, length: int) -> Any:
    index, child, sibling, positions = (torch.full((1, draft), -1) for _ in range(4))
    mask = torch.ones(draft * draft, dtype=torch.bool)
    speculation.build_tree_kernel_efficient_cpu(
        torch.tensor([parents]),
        torch.tensor([selected]),
        torch.tensor([length]),
        mask,
        positions,
        index,
        child,
        sibling,
        topk,
        3,
        draft,
        1,
    )
    return index[0], child[0].tolist(), sibling[0].tolist(), positions[0].tolist(), mask


def test_a_chain() -> None:
    index, child, sibling, positions, mask = build([0, 1, 2], [-1, 0, 1], 1, 4, 10)
    assert index.tolist() == [0, 1, 2, 3]
    assert child == [1, 2, 3, -1]
    assert sibling == [-1] * 4
    assert positions == [10, 11, 12, 13]
    assert mask.view(4, 4).equal(torch.ones(4, 4, dtype=torch.bool).tril())


def test_two_branches() -> None:
    # Two children of the root (0 and 1); the third token hangs below the second.
    _, child, sibling, positions, mask = build([0, 1, 4], [-1, 0, 1], 2, 4, 5)
    assert child == [1, -1, 3, -1]
    assert sibling == [-1, 2, -1, -1]
    assert positions == [5, 6, 6, 7]
    assert mask.view(4, 4).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    ("target", "accepted", "predicted"),
    [
        ([11, 12, 13, 14], [0, 1, 2, 3], [11, 12, 13, 14]),
        ([11, 99, 13, 14], [0, 1, -1, -1], [11, 99, -7, -7]),
        ([50, 12, 13, 14], [0, -1, -1, -1], [50, -7, -7, -7]),
    ],
)
def test_verify_walks_as_far_as_the_target_agrees(
    target: list[int], accepted: list[int], predicted: list[int]
) -> None:
    predicts, index = torch.full((4,), -7), torch.full((1, 4), -1)
    count = torch.zeros(1, dtype=torch.int32)
    speculation.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=index,
        accept_token_num=count,
        candidates=torch.tensor([[10, 11, 12, 13]]),
        retrive_index=torch.tensor([[0, 1, 2, 3]]),
        retrive_next_token=torch.tensor([[1, 2, 3, -1]]),
        retrive_next_sibling=torch.full((1, 4), -1),
        target_predict=torch.tensor([target]),
    )
    assert index[0].tolist() == accepted
    assert predicts.tolist() == predicted
    assert count.item() == sum(i != -1 for i in accepted) - 1


def test_verify_tries_siblings() -> None:
    predicts, index = torch.zeros(4, dtype=torch.int64), torch.full((1, 3), -1)
    count = torch.zeros(1, dtype=torch.int32)
    speculation.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=index,
        accept_token_num=count,
        candidates=torch.tensor([[10, 20, 21, 30]]),
        retrive_index=torch.tensor([[0, 1, 2, 3]]),
        retrive_next_token=torch.tensor([[1, -1, 3, -1]]),
        retrive_next_sibling=torch.tensor([[-1, 2, -1, -1]]),
        target_predict=torch.tensor([[21, 0, 30, 40]]),
    )
    assert index[0].tolist() == [0, 2, 3]
    assert predicts.tolist() == [21, 0, 30, 40]


def test_slots_go_in_and_come_out() -> None:
    table = torch.zeros(3, 8, dtype=torch.int32)
    requests, start, end = torch.tensor([2, 0]), torch.tensor([1, 4]), torch.tensor([4, 6])
    speculation.assign_req_to_token_pool_cpu(requests, table, start, end, torch.arange(10, 15), 8)
    assert table[2].tolist() == [0, 10, 11, 12, 0, 0, 0, 0]
    assert table[0].tolist() == [0, 0, 0, 0, 13, 14, 0, 0]
    packed = torch.zeros(5, dtype=torch.int64)
    speculation.assign_extend_cache_locs_cpu(requests, table, start, end, packed, 8)
    assert packed.tolist() == [10, 11, 12, 13, 14]
    drafts = torch.zeros(4, dtype=torch.int64)
    speculation.assign_draft_cache_locs_contiguous_cpu(requests, table, start, drafts, 8, 1, 2)
    assert drafts.tolist() == [10, 11, 13, 14]


def test_the_rest() -> None:
    bonus = torch.zeros(2, dtype=torch.int64)
    speculation.fill_bonus_tokens_cpu(
        torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([2, 3]), bonus, 3
    )
    assert bonus.tolist() == [2, 6]
    kept = torch.zeros(3, dtype=torch.int64)
    speculation.fill_accept_out_cache_loc_cpu(
        torch.tensor([0, -1, 3]), torch.tensor([7, 8, 9, 10]), kept
    )
    assert kept.tolist() == [7, 10, 0]
    ids = torch.tensor([1, 2, 3, 4, 5])
    speculation.rotate_input_ids_cpu(
        ids, torch.tensor([0, 3]), torch.tensor([3, 2]), torch.tensor([90, 91])
    )
    assert ids.tolist() == [2, 3, 90, 5, 91]
