"""`launch_server --plugin` as a person types it: our flags, and one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from tests import child


def launch(environment: Environment, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return child.finished(
        [str(environment.python), "-m", "sglang.launch_server", *argv],
        cpu_env({**environment.env, **env}),
    )


def server(checkpoint: Model, *argv: str) -> list[str]:
    return [
        "--model-path",
        str(checkpoint.folder),
        "--device",
        "cpu",
        "--skip-tokenizer-init",
        *argv,
    ]


def test_help_shows_our_flags(old: Environment) -> None:
    shown = launch(old, "--plugin", "--help")
    assert shown.returncode == 0
    for flag in ("--plugin", "--safe-reclaim-peer", "--safe-reclaim-audit"):
        assert flag in shown.stdout


PD = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend")


@pytest.mark.parametrize(
    ("argv", "env", "words"),
    [
        (("--plugin", "safe-reclam"), {}, ["--plugin", "safe-reclam", "choose from"]),
        (
            ("--plugin", "layer-split"),
            {},
            ["layer-split", "no --enable-dsa-cache-layer-split", "not in force", "not starting"],
        ),
        (("--plugin", "--spec-guard", "abort"), {}, ["spec-guard", "--speculative-algorithm"]),
        (("--plugin", "--spec-guard", "end"), {}, ["--spec-guard", "'end'", "abort"]),
        (("--plugin", "--spec-guard-rules", "x"), {}, ["--spec-guard-rules", "'x'", "published"]),
        (
            ("--plugin", "--spec-guard-secret-file", "/none"),
            {},
            ["--spec-guard-secret-file /none", "cannot be read"],
        ),
        (("--plugin", "--safe-reclaim-peer", "x"), {}, ["--safe-reclaim-peer", "'x'", "require"]),
        (
            ("--plugin", *PD, "nixl"),
            {},
            ["--disaggregation-transfer-backend nixl", "--plugin early-send-ordering"],
        ),
        (("--plugin", *PD, "mooncake"), {"MC_TCP_PROTO": "1"}, ["TCP protocol v1", "0.3.12"]),
        (("--plugin",), {"SGLANG_PLUGINS": "other"}, ["unrecognized arguments: --plugin"]),
    ],
    ids=[
        "unknown-fix",
        "no-split",
        "no-drafts",
        "unknown-action",
        "unknown-rules",
        "no-secret",
        "bad-setting",
        "backend",
        "tcp-v1",
        "plugin-excluded",
    ],
)
def test_bad_input_is_one_line_and_no_start(
    old: Environment,
    checkpoint: Model,
    argv: tuple[str, ...],
    env: dict[str, str],
    words: list[str],
) -> None:
    done = launch(old, *server(checkpoint, *argv), **env)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last


SPLIT = ("--plugin", "layer-split", "--disaggregation-mode", "prefill")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ["--enable-dsa-cache-layer-split", "not given", "(prefill)", "give it to"]),
        (
            ("--enable-dsa-cache-layer-split", "--kv-cache-dtype", "fp8_e5m2"),
            ["--kv-cache-dtype fp8_e5m2", "set it to auto or fp8_e4m3"],
        ),
        (
            ("--layer-split-scratch-tokens", "many"),
            ["--layer-split-scratch-tokens", "'many'", "number of tokens"],
        ),
    ],
    ids=["not-split", "dtype", "scratch"],
)
def test_a_split_that_cannot_be_is_one_line_and_no_start(
    new: Environment, checkpoint: Model, argv: tuple[str, ...], words: list[str]
) -> None:
    done = launch(new, *server(checkpoint, *SPLIT, *argv))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last


@pytest.mark.parametrize("release", ["old", "new"])
def test_doctor(release: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    environment: Environment = request.getfixturevalue(release)

    def doctor(**more: str) -> tuple[int, dict[str, Any]]:
        done = child.finished(
            [str(environment.python), "-m", "sglang_scaling_fixes.cli", "doctor", "--json"],
            cpu_env({**environment.env, "XDG_CACHE_HOME": str(tmp_path), **more}),
        )
        return done.returncode, json.loads(done.stdout)

    status, found = doctor()
    assert status == 0
    assert found["sglang"] == environment.release
    assert found["mooncake"]["protocol"] == "tcp-v2"
    states = {fix["name"]: fix["state"] for fix in found["fixes"]}
    assert states == {
        "safe-reclaim": "armed",
        "early-send-ordering": "native" if release == "old" else "armed",
        "hicache-ordering": "off",
        "layer-split": "off",
        "spec-guard": "armed",
        "resume": "armed",
    }
    assert not found["proof"]["kept"]
    # The second time it has been proven, and the loader is asked all the same.
    again_status, again = doctor()
    assert again["proof"] == {**found["proof"], "kept": True}
    assert (again_status, again["fixes"]) == (0, found["fixes"])
    left_out, excluded = doctor(SGLANG_PLUGINS="other")
    assert left_out == 1 and not excluded["plugin"]["loaded"]


def test_doctor_says_what_a_release_lacks_for_a_fix(old: Environment, tmp_path: Path) -> None:
    done = child.finished(
        [
            *(str(old.python), "-m", "sglang_scaling_fixes.cli", "doctor", "--json"),
            *("--plugin", "layer-split"),
        ],
        cpu_env({**old.env, "XDG_CACHE_HOME": str(tmp_path)}),
    )
    assert done.returncode == 1
    (split,) = [fix for fix in json.loads(done.stdout)["fixes"] if fix["name"] == "layer-split"]
    assert split["state"] == "unsupported"
    for word in ("this release has no --enable-dsa-cache-layer-split", "0.5.16"):
        assert word in split["reason"]
