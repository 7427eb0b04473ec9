"""The steps that the race checker's scenarios take from the scheduler are in every release."""

from __future__ import annotations

import ast

import pytest

from tests.contract.wheel_ast import Wheel
from tests.contract.wheels import ARMED

pytestmark = pytest.mark.parametrize("release", ARMED)


def calls(tree: ast.AST) -> list[str]:
    """Calls in the order of the source, with their arguments."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return [ast.unparse(node) for node in found]


def test_the_forward_stream_waits_for_the_schedule_stream_before_a_forward(wheel: Wheel) -> None:
    order = calls(wheel.find("sglang.srt.managers.scheduler:Scheduler.run_batch").node)
    waits = [i for i, call in enumerate(order) if "forward_stream.wait_stream(self.sch" in call]
    runs = [i for i, call in enumerate(order) if "forward_batch_generation(" in call]
    assert waits and runs and waits[0] < runs[0]


def test_the_consumer_of_a_load_is_set_before_its_forward(wheel: Wheel) -> None:
    worker = "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation"
    order = calls(wheel.find(worker).node)
    sets = [i for i, call in enumerate(order) if call.startswith("self.set_hicache_consumer(")]
    runs = [i for i, call in enumerate(order) if "model_runner.forward(" in call]
    assert sets and runs and sets[0] < runs[0]
