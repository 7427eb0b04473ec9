"""Failed writes: one of so many while the file is there, and their bytes land all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_scaling_fixes.lab.faults import failing


class Engine:
    def __init__(self) -> None:
        self.landed: list[str] = []

    def batch_transfer_sync_write(self, session: str) -> int:
        self.landed.append(session)
        return 0

    transfer_sync_write = batch_transfer_sync_write

    def batch_transfer_async_write(self, session: str) -> int:
        self.landed.append(session)
        return 17  # the batch


def attached(path: Path, late: list[Callable[[], Any]]) -> Any:
    module: Any = ModuleType(failing.MODULE)
    module.TransferEngine = type("TransferEngine", (Engine,), {})
    failing.attacher(path, late.append)(module)
    return module.TransferEngine()


def test_one_of_so_many_in_a_row_fails_and_lands_later(tmp_path: Path) -> None:
    late: list[Callable[[], Any]] = []
    file = tmp_path / "failing"
    engine = attached(file, late)
    assert [engine.batch_transfer_sync_write("before") for _ in range(50)] == [0] * 50
    file.write_text("20")
    engine.landed.clear()
    for _ in range(5):
        answers = [engine.batch_transfer_sync_write("now") for _ in range(20)]
        assert sorted(answers) == [-1] + [0] * 19
    assert len(engine.landed) == 95
    for write in late:
        write()
    assert len(engine.landed) == 100
    file.unlink()
    assert [engine.batch_transfer_sync_write("after") for _ in range(50)] == [0] * 50


def test_each_way_of_writing_fails_with_a_word_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "failing"
    file.write_text("1")
    engine = attached(file, [])
    assert engine.transfer_sync_write("a") == engine.batch_transfer_sync_write("a") == -1
    assert engine.batch_transfer_async_write("a") == 0  # no batch


def test_which_ones_fail_is_the_same_in_every_run() -> None:
    once, again = failing.OneInSoMany(), failing.OneInSoMany()
    first = [once.next(20) for _ in range(2000)]
    assert first == [again.next(20) for _ in range(2000)]
    # An even period must not meet only one kind of two that alternate.
    assert {i % 2 for i, fails in enumerate(first) if fails} == {0, 1}
