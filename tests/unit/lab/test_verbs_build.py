"""Where verbs in software cannot be had: one clear line, and TCP goes on working."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sglang_scaling_fixes.lab import debian
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.verbs import build
from tests.verbs.needs import verbs_in_software


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty lab home, on a machine without RDMA devices."""
    monkeypatch.setenv("SGLANG_SCALING_FIXES_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build, "SYSTEM_DEVICES", tmp_path / "no devices")


def refusal() -> str:
    with pytest.raises(LabError) as refused:
        build.build(progress=lambda _: None)
    words = str(refused.value)
    assert "--transport tcp" in words and "\n" not in words
    return words


def test_beside_real_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "class" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(build, "SYSTEM_DEVICES", tmp_path / "class")
    assert "mlx5_0" in refusal()


def test_without_namespaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "devices.py"
    refusing.write_text("raise SystemExit('no namespace: Operation not permitted')")
    monkeypatch.setattr(build, "DEVICES", refusing)
    assert "Operation not permitted" in refusal()


@pytest.fixture
def no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that could have devices in software, whatever this one is."""
    monkeypatch.setattr(build, "obstacle", lambda: None)


@pytest.mark.usefixtures("no_obstacle")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "C compiler" in refusal()


@pytest.mark.usefixtures("no_obstacle")
def test_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build, "_compiles", lambda *_: False)
    monkeypatch.setattr(debian, "unpack", lambda *what: asked.append(what))
    assert "libibverbs-dev" in refusal()
    assert asked  # they were looked for


@pytest.mark.usefixtures("no_obstacle")
def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "headers", lambda *_: ["-no-such-flag"])
    assert "no-such-flag" in refusal()
    assert list((tmp_path / "home" / "verbs").iterdir()) == []


@verbs_in_software
def test_devices_are_seen_by_the_command_alone() -> None:
    command, env = build.over_rdma(
        ["ls", "/sys/class/infiniband", "/dev/infiniband"],
        {"MC_FORCE_TCP": "1", "LD_LIBRARY_PATH": "/before"},
        {"rdma0": "127.0.0.1", "rdma1": "127.0.0.2"},
    )
    assert "MC_FORCE_TCP" not in env and env["LD_LIBRARY_PATH"].endswith(":/before")
    assert env["SOFTVERBS_DEVICES"] == "rdma0=127.0.0.1,rdma1=127.0.0.2"
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"rdma0", "rdma1", "uverbs0", "uverbs1"} <= set(seen)
    assert not Path("/sys/class/infiniband").exists()
