"""Arguments as stock made them: wherever a release keeps them, and as given where it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes.resolved_args import resolved
from tests.layersplit.stand_ins import module

GIVEN = SimpleNamespace(speculative_algorithm="NEXTN", dsa_prefill_backend=None, page_size=64)


def unfilled() -> Any:
    raise RuntimeError("not in this process yet")


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(dsa_prefill_backend="trtllm")
    graph = SimpleNamespace(cuda_graph_config="graphs")
    module(
        monkeypatch,
        "sglang.srt.runtime_context",
        get_spec=lambda: SimpleNamespace(speculative_algorithm="EAGLE"),
        get_memory=unfilled,
        get_exec=lambda: SimpleNamespace(kernel=kernel, graph=graph),
    )


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speculative_algorithm", "EAGLE"),
        ("dsa_prefill_backend", "trtllm"),
        ("cuda_graph_config", "graphs"),
        ("page_size", 64),
        ("nobody_has_it", None),
    ],
)
def test_what_stock_settled_on_goes_before_what_was_given(name: str, value: Any) -> None:
    assert resolved(GIVEN, name) == value


def test_a_release_without_a_context_has_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "sglang.srt.runtime_context")
    assert resolved(GIVEN, "speculative_algorithm") == "NEXTN"
