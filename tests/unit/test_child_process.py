"""A question to a process of its own: the answer, or why there is none."""

from __future__ import annotations

import os

import pytest

from sglang_scaling_fixes import child_process

MARK = "said:"


def ask(script: str, timeout_s: float = 60.0) -> object:
    return child_process.ask("-c", script, env=os.environ, mark=MARK, timeout_s=timeout_s)


def test_only_the_first_marked_line_is_read() -> None:
    script = """print("a log line"); print('said:{"a": [1]}'); print("said:2")"""
    assert ask(script) == {"a": [1]}


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; print('other', 1); sys.exit('first\\nlast')", "last"),
        ("pass", "no output"),
    ],
)
def test_a_process_without_an_answer_says_its_last_line(script: str, says: str) -> None:
    with pytest.raises(child_process.NoAnswer) as caught:
        ask(script)
    assert str(caught.value) == says


def test_a_process_is_not_waited_for_without_end() -> None:
    with pytest.raises(child_process.NoAnswerInTime, match="no answer within 0 s"):
        ask("import time; time.sleep(600)", timeout_s=0.0)
