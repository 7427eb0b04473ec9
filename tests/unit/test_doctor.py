"""What doctor makes of the loader's answer, and of what a server asks that no loader asks."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_scaling_fixes import attach, doctor, doctor_command, loading, release
from sglang_scaling_fixes.config import PLUGIN_ENV
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.loading import Loading
from sglang_scaling_fixes.patches import applied
from sglang_scaling_fixes.proof_store import Proof
from sglang_scaling_fixes.specguard.flags import ACTION

ARMED = [
    {"name": "safe-reclaim", "state": "armed", "reason": "proven"},
    {"name": "early-send-ordering", "state": "armed", "reason": "proven"},
    {"name": "hicache-ordering", "state": "off", "reason": "not asked for"},
    {"name": "layer-split", "state": "off", "reason": "not asked for"},
    {"name": "spec-guard", "state": "armed", "reason": "proven"},
    {"name": "resume", "state": "armed", "reason": "proven"},
]
MOONCAKE = release.Mooncake("0.3.13", "mooncake-transfer-engine-non-cuda", "tcp-v2")


def report(
    monkeypatch: pytest.MonkeyPatch,
    loading: Loading,
    asked: str | None = None,
    mooncake: release.Mooncake | None = MOONCAKE,
    version: str = "0.5.23",
    **env: str,
) -> dict[str, Any]:
    for name in (PLUGIN_ENV, ACTION.env):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "_load", lambda asked, again: (loading, False))
    monkeypatch.setattr(release, "sglang_version", lambda: version)
    monkeypatch.setattr(release, "mooncake", lambda: mooncake)
    return doctor.report(asked)


def loaded(**more: Any) -> Loading:
    return Loading(None, statuses=[dict(status) for status in ARMED], **more)


def states(result: dict[str, Any]) -> dict[str, str]:
    return {fix["name"]: fix["state"] for fix in result["fixes"]}


def test_called_and_proven_is_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = report(monkeypatch, loaded())
    assert result["asked"] == ["safe-reclaim", "early-send-ordering", "spec-guard", "resume"]
    assert doctor.in_force(result)


def test_not_called_is_not_armed_whatever_the_classes_would_let_attach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses = [dict(status) for status in ARMED]
    result = report(monkeypatch, Loading("nobody calls it", statuses=statuses))
    assert set(states(result).values()) == {"unsupported"}
    assert not doctor.in_force(result)


def test_a_server_that_ends_while_it_loads_has_nothing_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another plugin's end, or one of ours behind the proofs."""
    result = report(monkeypatch, loaded(refused="it ended"))
    assert states(result)["safe-reclaim"] == states(result)["spec-guard"] == "unsupported"
    assert "it ended" in result["fixes"][0]["reason"]


def test_a_fix_that_could_not_be_armed_keeps_its_own_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = loaded(refused="asked for and not in force: spec-guard: it moved")
    found.statuses[4].update(state="unsupported", reason="it moved")
    result = report(monkeypatch, found)
    assert result["fixes"][4]["reason"] == "it moved"
    assert states(result)["safe-reclaim"] == "armed"
    assert not doctor.in_force(result)


def test_a_variable_that_asks_for_one_more_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    env: dict[str, Any] = {ACTION.env: "abort"}
    result = report(monkeypatch, loaded(), "safe-reclaim", **env)
    assert result["asked"] == ["safe-reclaim", "spec-guard"]
    with pytest.raises(ConfigError, match="drop one of the two"):
        report(monkeypatch, loaded(), "none", **env)


def test_nothing_asked_for_is_nothing_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = report(monkeypatch, Loading(None), "none")
    assert "armed" not in states(result).values()
    assert result["asked"] == [] and doctor.in_force(result)


def test_what_only_a_prefill_or_decode_server_refuses_is_said_as_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = report(monkeypatch, loaded(), mooncake=None)
    assert states(result) == {
        "safe-reclaim": "unsupported",
        "early-send-ordering": "armed",
        "hicache-ordering": "off",
        "layer-split": "off",
        "spec-guard": "armed",
        "resume": "armed",
    }
    for word in ("prefill or decode", "Mooncake is not installed"):
        assert word in result["fixes"][0]["reason"]


def test_mooncake_does_not_hide_that_the_fix_itself_does_not_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = loaded()
    found.statuses[0].update(state="unsupported", reason="it moved")
    assert report(monkeypatch, found, mooncake=None)["fixes"][0]["reason"] == "it moved"


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        (attach.LAST_RELEASE, False),
        (attach.FIRST_RELEASE, False),
        (f"{attach.LAST_RELEASE}.post1", True),
        ("0.6.0", True),
    ],
)
def test_a_release_that_is_newer_than_any_tested_is_called_that(
    monkeypatch: pytest.MonkeyPatch, version: str, newer: bool
) -> None:
    monkeypatch.setattr(applied, "state", lambda release, _: [{"name": "p", "state": release}])
    found = loaded(sglang="/somewhere/sglang", proof=Proof({}, "2026", kept=True))
    result = report(monkeypatch, found, version=version)
    words = f"newer than any release that was tested, the last is {attach.LAST_RELEASE}"
    assert result["untested"] == (words if newer else None)
    said = doctor_command.text(result)
    assert (words in said) == newer
    assert f"Patch     p: {version}" in said  # what the tree is patched with
    assert "Proven    2026" in said


def test_no_answer_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_TIMEOUT_S", 0.0)
    with pytest.raises(ConfigError, match="within 0 s; try again"):
        loading.ask({})
