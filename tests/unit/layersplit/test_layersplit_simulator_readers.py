"""Each format of a trace: what is read, and which line is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit.simulator import readers
from sglang_scaling_fixes.layersplit.simulator.records import Request, reuse
from sglang_scaling_fixes.paths import ROOT

TRACES = ROOT / "benchmarks" / "layersplit" / "traces"
AIPERF = TRACES / "agentic_code_30sessions_seed42.jsonl"
MOONCAKE = TRACES / "mooncake_conversation_head200.jsonl"

TURN = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
FIRST = {"session_id": "a", **TURN}
LATER = {"session_id": "a", "delay": 2000, "input_length": 10, "output_length": 1, "hash_ids": [3]}
SAID: dict[str, Any] = {
    "session_id": "a",
    "timestamp": 5_000_000,
    "input": "x" * 300,
    "output": "yes",
}


def read(folder: Path, *lines: Any, name: str = "auto", block: int | None = None) -> list[Request]:
    path = folder / "t.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return list(readers.read(path, name, block)[1])


def test_mooncake() -> None:
    """Counts of the file, and its first line."""
    name, trace = readers.read(MOONCAKE, "auto", None)
    assert (name, len(trace), trace[0].prompt, trace[0].output) == ("mooncake", 200, 6758, 500)
    assert trace[0].blocks == tuple(range(14)) and trace[0].fill(13) == 6758 - 13 * 512
    assert len({one.arrival for one in trace}) == 25 and trace[-1].arrival == 72.0
    assert trace[-1].line == 200


def test_aiperf_has_whole_prompts() -> None:
    """What AIPerf's own figures of this file say: 98.8 thousand tokens, nine tenths came before."""
    name, trace = readers.read(AIPERF, "auto", None)
    assert (name, len(trace), len({one.session for one in trace})) == ("aiperf", 385, 31)
    assert sum(one.prompt for one in trace) / len(trace) == pytest.approx(98_768, abs=1)
    assert reuse(trace) == pytest.approx(0.929, abs=0.001)


def test_a_later_turn_has_the_prompt_the_answer_and_what_it_adds(tmp_path: Path) -> None:
    first, later = read(tmp_path, FIRST, LATER)
    assert (first.arrival, later.arrival, later.delay) == (0.0, None, 2.0)
    assert later.prompt == 600 + 5 + 10
    assert later.blocks[:2] == first.blocks == (1, 2)
    # the answer's block and the turn's own are not reached: 615 tokens fill two blocks
    assert len(later.blocks) == 2


def test_control_two_answers_are_never_the_same_block(tmp_path: Path) -> None:
    long = {**FIRST, "output_length": 2000}
    turns = read(tmp_path, long, LATER, {**long, "session_id": "b"}, {**LATER, "session_id": "b"})
    (one, other) = (turn.blocks for turn in (turns[1], turns[3]))
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])


def test_lmcache_is_put_in_order_and_cut_into_blocks(tmp_path: Path) -> None:
    first = {**SAID, "timestamp": 3_000_000}
    longer = {**SAID, "input": SAID["input"] + "y" * 300}
    forked = {**SAID, "input": "z" + longer["input"][1:], "timestamp": 9_000_000}
    turns = read(tmp_path, longer, first, forked)
    assert [turn.line for turn in turns] == [2, 1, 3]
    assert [turn.arrival for turn in turns] == [0.0, 2.0, 6.0]
    assert [turn.prompt for turn in turns] == [75, 150, 150]
    short, long, other = (turn.blocks for turn in turns)
    assert len(long) == -(-150 // readers.LMCACHE_BLOCK) and long[0] == short[0]
    assert not set(other) & set(long)  # a prefix that differs at once shares nothing
    assert {type(block) for block in long} == {bytes}  # digests, no text


def test_block_size_is_the_files(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {**TURN, "hash_ids": list(range(38))}, block=16)
    assert (one.block, one.fill(37)) == (16, 8)


def test_empty_lines_do_not_count_as_requests_but_as_lines(tmp_path: Path) -> None:
    assert [one.line for one in read(tmp_path, TURN, "", "  ", TURN)] == [1, 4]


MALFORMED: list[tuple[list[Any], str]] = [
    ([TURN, "{"], "line 2: no JSON object: '{'"),
    ([TURN, "[1]"], "line 2: no JSON object: '[1]'"),
    ([TURN, "[" * 100_000], "line 2: no JSON object"),
    ([TURN, {"timestamp": 0}], "line 2: no input_length"),
    ([{**TURN, "input_length": "600"}], "line 1: input_length '600' is no whole number from 1"),
    ([{**TURN, "input_length": True}], "line 1: input_length True"),
    ([{**TURN, "input_length": 10**12}], "line 1: input_length 1000000000000"),
    ([{**TURN, "output_length": -1}], "line 1: output_length -1 is no whole number from 0"),
    ([{**TURN, "timestamp": -1}], "line 1: timestamp -1 is no time from 0"),
    ([{**TURN, "timestamp": float("nan")}], "line 1: timestamp nan"),
    ([{**TURN, "timestamp": 10**400}], "line 1: timestamp 1000000000000000"),
    ([{**TURN, "hash_ids": []}], "line 1: hash_ids [] is no list of block ids"),
    ([{**TURN, "hash_ids": ["a", 1]}], "line 1: hash_ids ['a', 1]"),
    ([{**TURN, "hash_ids": [1, 2, 3]}], "line 1: 3 hash_ids for 600 tokens; blocks of 512"),
    ([FIRST, {**LATER, "hash_ids": []}], "line 2: hash_ids [] is no list"),
    ([FIRST, {**LATER, "input_length": 513}], "line 2: 1 hash_ids for 513 tokens"),
    ([FIRST, {k: v for k, v in LATER.items() if k != "delay"}], "line 2: no delay"),
    ([{k: v for k, v in FIRST.items() if k != "timestamp"}], "line 1: no timestamp"),
    ([{**FIRST, "session_id": 7}], "line 1: session_id 7 is no text"),
    ([SAID, {**SAID, "input": ""}], "line 2: input is empty"),
    ([SAID, {**SAID, "input": None}], "line 2: input None is no text"),
    ([{"a": 1}], "line 1: of no known format"),
]


@pytest.mark.parametrize(("lines", "said"), MALFORMED)
def test_a_malformed_line_is_named_by_its_number(
    lines: list[Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as found:
        read(tmp_path, *lines)
    text = str(found.value)
    assert said in text and "t.jsonl" in text and "\n" not in text and len(text) < 400


def test_a_text_that_utf8_cannot_say_is_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, {**SAID, "input": "\ud800" * 9})) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"", "no request in it"), (b"\xff\xfe\n", "not UTF-8")],
)
def test_a_file_that_is_no_trace(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        readers.read(path, "auto", None)


def test_a_named_format_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: no session_id"):
        read(tmp_path, TURN, name="aiperf")
