"""The lab's pure parts: what counts as refused, lost, wrong, held."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.lab import scenarios, soak
from sglang_scaling_fixes.lab.client import Answer
from sglang_scaling_fixes.lab.cluster import refusal, refuse_unprotected
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.observations import Observations
from sglang_scaling_fixes.lab.race import differing, margin
from sglang_scaling_fixes.lab.standins import lossy
from sglang_scaling_fixes.reclaim import messages

ASK = messages.encode(messages.Ask("tcp://10.0.0.1:1", "10.0.0.2:2", 7, "g1"))
BIND = messages.encode(messages.Bind("tcp://10.0.0.1:1", "10.0.0.2:2", "g1", "e1", 3))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(500, {"error": {"message": "KV transfer failed"}}), "KV transfer failed"),
        (Answer(503, {"error": "full, come back"}), "full, come back"),
        (Answer(400, {"detail": "no"}), "no"),
        (Answer(200, {"meta_info": {"finish_reason": {"type": "abort", "message": "a"}}}), "a"),
        (Answer(200, {"meta_info": {"finish_reason": {"type": "length"}}}), None),
        (Answer(0, "TimeoutError: timed out"), None),
        (Answer(500, "Internal Server Error"), None),
        (Answer(500, {"error": {"message": " "}}), None),
    ],
)
def test_a_refusal_is_an_error_in_words(answer: Answer, words: str | None) -> None:
    assert refusal(answer) == words


@pytest.mark.parametrize(
    ("frames", "stop"),
    [
        ([b"ABORT", b"12", b"10.0.0.1", b"4000"], ("ABORT", 12)),
        ([ASK], ("Ask", 7)),
        ([b"12", b"10.0.0.1", BIND], None),
        ([BIND], None),
        ([b"None", b"10.0.0.1"], None),
        ([b"\x00noise"], None),
    ],
)
def test_only_messages_that_say_stop_are_lost(
    frames: list[bytes], stop: tuple[str, int] | None
) -> None:
    assert lossy.stop_message(frames) == stop


def test_so_many_are_lost_per_room_and_kind() -> None:
    sent: list[bytes] = []
    lost: list[int] = []

    class Socket:
        def send_multipart(self, frames: list[bytes]) -> None:
            sent.append(frames[0])

    module: Any = ModuleType("zmq")
    module.Socket = Socket
    lossy.attacher(2, lost.append)(module)
    for _ in range(3):
        Socket().send_multipart([b"ABORT", b"12"])
        Socket().send_multipart([ASK])
    Socket().send_multipart([b"ABORT", b"13"])
    assert sorted(sent) == sorted([b"ABORT", ASK])
    assert lost == [12, 7, 12, 7, 13]


def test_observations_are_read_as_far_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "observations.jsonl"
    seen = Observations(path)
    assert seen.of("a") == {} and seen.pool() is None
    final = {"event": "final", "rid": "a", "digests": [1]}
    pool = {"event": "pool", "free_tokens": 5, "free_metadata": 2, "time": 0.0}
    half = json.dumps({"event": "lost", "bootstrap_room": 3})
    path.write_text(f"{json.dumps(final)}\n{json.dumps(pool)}\n{half[:9]}")
    assert seen.of("a") == {"final": final} and seen.digests("a") == [[1]]
    assert seen.pool() == pool and seen.lost(3) == 0
    with path.open("a") as file:
        file.write(half[9:] + "\n")
    assert seen.lost(3) == 1
    seen.forget("a")
    assert seen.of("a") == {}


def test_outputs_differ_where_an_id_does_or_is_missing() -> None:
    assert differing([1, 2, 3], [1, 2, 3]) == 0
    assert differing([1, 9], [1, 2, 3]) == 2
    assert differing([], [1, 2]) == 2


@pytest.mark.parametrize(
    ("release", "held"),
    [("0.5.12", False), ("0.5.20", False), ("0.5.21", True), ("0.5.15.post1", False)],
)
def test_the_rate_follows_what_the_release_does(release: str, held: bool) -> None:
    plan = scenarios.scenario("timeout")
    assert scenarios.holds(release) is held
    assert plan.rate_for(release) == (plan.rate_held if held else plan.rate)


@pytest.mark.parametrize("plan", scenarios.SCENARIOS.values(), ids=lambda plan: plan.name)
def test_the_victims_of_a_scenario_need_the_late_slots(plan: scenarios.Scenario) -> None:
    running = sum(plan.runners)
    assert sum(plan.late) + running <= scenarios.POOL_TOKENS
    assert sum(plan.late) + running + sum(plan.victims) > scenarios.POOL_TOKENS


def test_an_unknown_scenario_is_one_line_that_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "reclaim", "--release", "0.5.12", "--scenario", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(name in said for name in scenarios.SCENARIOS)
    with pytest.raises(LabError):
        scenarios.scenario("x")


RESULT: dict[str, Any] = {
    **dict.fromkeys(cli.SOAK_ROWS, 0),
    "release": "0.5.23",
    "minutes": 1.0,
    "half": "fixed",
    "frees_by_proof": {"P2": 3},
    "refusals": {"Decode transfer failed": 2},
    "decode_crashed": False,
    "run_dir": "/runs/1",
}


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, 0),
        ({"refused": 5}, 0),
        ({"corrupted_outputs": 1}, 1),
        ({"corrupted_kv": 1}, 1),
        ({"leaked_tokens": 4}, 1),
        ({"leaked_metadata": 1}, 1),
        ({"held_tokens": 1}, 1),
        ({"unanswered": 1}, 1),
        ({"decode_crashed": True}, 1),
    ],
)
def test_a_soak_fails_if_anything_is_wrong_or_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    status: int,
) -> None:
    monkeypatch.setattr(soak, "run", lambda *_, **__: {**RESULT, **changed})
    assert cli.main(["lab", "soak", "--minutes", "1"]) == status
    shown = capsys.readouterr().out
    assert "P2 3" in shown and "2 x Decode transfer failed" in shown


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "much", "99999"])
def test_minutes_are_checked(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "soak", "--minutes", minutes])
    assert ended.value.code == 2
    assert "minutes" in capsys.readouterr().err


def test_the_margin_is_that_of_the_closest_token() -> None:
    tops = [[[-0.1, 5, None], [-2.0, 6, None]], [[-0.5, 5, None], [-0.7, 6, None]]]
    body = {"meta_info": {"output_top_logprobs": tops}}
    assert margin(body) == pytest.approx(0.2)
    assert margin("no answer") == margin({}) == 0.0


def test_error_texts_are_counted_without_what_differs() -> None:
    one = "failed for client-3-00012. room=195004 after 3.1s"
    other = "failed for client-1-00002. room=7 after 12s"
    assert soak.normal(one) == soak.normal(other) == "failed for RID room=N after Ns"


@pytest.mark.parametrize("asked", [{"PLUGIN": "default"}, {"SPEC_GUARD": "abort"}])
def test_a_lab_server_is_not_started_without_what_its_environment_asks_for(
    asked: dict[str, str],
) -> None:
    env = {f"SGLANG_SCALING_FIXES_{name}": value for name, value in asked.items()}
    for plugins in ("other", "other,more", ","):
        with pytest.raises(LabError, match=f"SGLANG_PLUGINS={plugins} leaves"):
            refuse_unprotected({**env, "SGLANG_PLUGINS": plugins})
        refuse_unprotected({"SGLANG_PLUGINS": plugins})
    for plugins in ("", "scaling_fixes", "other, scaling_fixes"):
        refuse_unprotected({**env, "SGLANG_PLUGINS": plugins})
    refuse_unprotected(env)
