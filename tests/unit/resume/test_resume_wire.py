"""What a client may write to resume, and that a refusal names field, value and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang_scaling_fixes.resume import wire
from sglang_scaling_fixes.resume.wire import FIELD, BadResumeError


def split(value: Any, **rest: Any) -> Any:
    return wire.split(json.dumps({FIELD: value, **rest}).encode())


def test_the_field_is_taken_out_and_the_rest_is_as_it_was() -> None:
    rest = {"text": "é\ud83d", "n": 1, "sampling_params": {"n": None}, "x": [1.5, None, {}]}
    body, ask = split({"output_ids": [0, 7, 7]}, **rest)
    assert (ask.ids, ask.report_ids) == ([0, 7, 7], False)
    assert json.loads(body) == rest


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"not json " + FIELD.encode(),
        b'["%s"]' % FIELD.encode(),
        json.dumps({"text": f"what is {FIELD}?"}).encode(),
        b"\xff\xfe",
    ],
)
def test_a_body_without_the_field_is_not_for_us(body: bytes) -> None:
    assert wire.split(body) is None


@pytest.mark.parametrize(
    ("value", "rest", "said"),
    [
        ([1], {}, '[1] is not {"output_ids"'),
        (None, {}, "null is not"),
        ({"output_ids": [1], "more": 1}, {}, "is not"),
        ({"report_ids": True}, {}, "is not"),
        ({"output_ids": [1], "report_ids": 1}, {}, "report_ids 1"),
        ({"output_ids": "1"}, {}, 'output_ids "1" is not a list'),
        ({"output_ids": [1, -2]}, {}, "output_ids[1] -2"),
        ({"output_ids": [1, True]}, {}, "output_ids[1] true"),
        ({"output_ids": [1.0]}, {}, "output_ids[0] 1.0"),
        ({"output_ids": [1 << 31]}, {}, "output_ids[0] 2147483648"),
        ({"output_ids": [["x" * 100]]}, {}, "output_ids[0]"),
        ({"output_ids": [1], "steps": 1}, {}, "steps 1 is not a list"),
        ({"output_ids": [1, 2], "steps": [1, 1]}, {}, "steps[1] 1 is not a number of tokens above"),
        ({"output_ids": [1, 2], "steps": [3]}, {}, "steps[0] 3"),
        ({"output_ids": [1, 2], "steps": [True]}, {}, "steps[0] true"),
        ({"output_ids": [1]}, {"n": 2}, "n 2"),
        ({"output_ids": [1]}, {"sampling_params": {"n": 3}}, "n 3"),
        ({"output_ids": [1]}, {"sampling_params": {"beam_width": 4}}, "beam_width 4"),
        ({"output_ids": [1]}, {"sampling_params": [{}]}, "sampling_params is a list"),
        ({"output_ids": [1]}, {"text": ["a", "b"]}, "text is a batch"),
        ({"output_ids": [1]}, {"prompt": ["a"]}, "prompt is a batch"),
        ({"output_ids": [1]}, {"input_ids": [[1], [2]]}, "input_ids is a batch"),
        ({"output_ids": [1]}, {"background": True}, "background true"),
    ],
)
def test_a_refusal_names_what_is_wrong(value: Any, rest: dict[str, Any], said: str) -> None:
    with pytest.raises(BadResumeError) as caught:
        split(value, **rest)
    line = str(caught.value)
    assert wire.is_ours(line) and said in line
    assert "\n" not in line and len(line) < 300
    assert any(remedy in line for remedy in ("send", "use", "resume one", "resume each"))


def test_a_prompt_of_tokens_is_one_prompt() -> None:
    assert split({"output_ids": []}, prompt=[1, 2, 3])[1].ids == []
    assert split({"output_ids": [1]}, input_ids=[1, 2, 3])[1].ids == [1]


def test_a_stream_may_be_asked_to_say_its_tokens() -> None:
    assert split({"output_ids": [], "report_ids": True})[1].report_ids
    assert split({"output_ids": [7, 8, 9], "steps": [1, 3]})[1].steps == [1, 3]
    assert wire.ids_comment([1, 23]) == b": sglang_scaling_fixes_resume_ids [1,23]\n\n"


@pytest.mark.parametrize("path", sorted(wire.PATHS))
def test_an_error_is_written_as_the_api_writes_it(path: str) -> None:
    error = json.loads(wire.error_body(path, "why"))
    assert error["error"]["message"] == "why"
    assert error["error"]["param"] == FIELD
    assert ("type" in error) == (path == "/v1/messages")
