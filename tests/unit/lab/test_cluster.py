"""What lab servers are given and refuse, and what counts as a refusal of theirs."""

from __future__ import annotations

import pytest

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.servers.client import Answer
from sglang_scaling_fixes.lab.servers.cluster import ClusterSpec
from sglang_scaling_fixes.lab.servers.pending import refusal
from sglang_scaling_fixes.lab.servers.server import refuse_unprotected


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


def test_a_cluster_has_one_or_two_prefill_servers() -> None:
    with pytest.raises(LabError, match=r"prefills=3: a lab cluster has 1 or 2"):
        ClusterSpec(prefills=3)


def test_servers_sleep_only_where_they_are_asked_to() -> None:
    assert ClusterSpec(tokens=300).common_flags() == ["--max-total-tokens", "300"]
    assert ClusterSpec(sleep_on_idle=True).common_flags()[-1] == "--sleep-on-idle"
