"""Servers that cannot be protected are refused before they start, with flag, value and remedy."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sglang_scaling_fixes import machine, release
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.reclaim import layout, server_args
from sglang_scaling_fixes.reclaim.decode import fence
from sglang_scaling_fixes.reclaim.server_args import check
from tests.machines import MACHINES


@pytest.fixture(autouse=True)
def good_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    found = release.Mooncake("0.3.13.post1", "mooncake-transfer-engine", "rdma")
    monkeypatch.setattr(release, "mooncake", lambda: found)
    monkeypatch.delenv("SGLANG_DISAGG_STAGING_BUFFER", raising=False)


@dataclasses.dataclass
class Stock:
    """The fields we look at, with stock's defaults: this release knows them all."""

    disaggregation_mode: str
    disaggregation_transfer_backend: str = "mooncake"
    enable_hisparse: bool = False
    elastic_ep_backend: str | None = None
    enable_hierarchical_cache: bool = False
    disaggregation_decode_enable_radix_cache: bool = False
    hicache_storage_backend: str | None = None
    enable_pd_role_switch: bool = False
    disaggregation_decode_allocation_policy: str = "early"
    disaggregation_decode_host_receive_threshold: float = 1.0
    pp_size: int = 1
    dcp_size: int = 1


def args(mode: str = "decode", /, **fields: Any) -> Any:
    return Stock(mode, **fields)


@pytest.mark.parametrize("mode", ["null", "prefill", "decode"])
def test_plain_servers_pass(mode: str) -> None:
    check(args(mode))


def test_a_server_without_disaggregation_exposes_nothing() -> None:
    check(args("null", disaggregation_transfer_backend="nixl", enable_hisparse=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"disaggregation_transfer_backend": "nixl"}, ["--disaggregation-transfer-backend nixl"]),
        ({"enable_hisparse": True}, ["--enable-hisparse True"]),
        ({"enable_pd_role_switch": True}, ["--enable-pd-role-switch"]),
        ({"pp_size": 2}, ["--pp-size 2"]),
        ({"dcp_size": 2}, ["--dcp-size 2"]),
        (
            {"disaggregation_decode_host_receive_threshold": 0.5},
            ["--disaggregation-decode-host-receive-threshold 0.5"],
        ),
        (
            {"disaggregation_decode_allocation_policy": "prefill_complete"},
            ["--disaggregation-decode-allocation-policy prefill_complete"],
        ),
    ],
)
def test_refusals_name_flag_value_and_remedy(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(args(**fields))
    for word in [*words, "--plugin none"]:
        assert word in str(caught.value)


def test_a_release_that_lacks_a_field_or_keeps_its_fields_in_a_struct() -> None:
    record = msgspec.defstruct(
        "ServerArgs",
        [
            ("disaggregation_mode", str),
            ("disaggregation_transfer_backend", str, "mooncake"),
            ("pp_size", int, 1),
        ],
    )
    check(record("decode"))
    with pytest.raises(ConfigError, match="--pp-size 2"):
        check(record("decode", pp_size=2))


def test_pipeline_parallel_prefill_is_fine() -> None:
    check(args("prefill", pp_size=2))


def test_missing_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "mooncake", lambda: None)
    with pytest.raises(ConfigError, match="pip install mooncake-transfer-engine"):
        check(args())


@pytest.mark.parametrize("value", ["1", "true", "Yes", "y"])
def test_staging_buffers_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SGLANG_DISAGG_STAGING_BUFFER", value)
    with pytest.raises(ConfigError, match="SGLANG_DISAGG_STAGING_BUFFER"):
        check(args("prefill"))


@pytest.mark.parametrize("value", ["", "0", "False", "no", "off"])
def test_staging_buffers_that_are_off_are_not(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SGLANG_DISAGG_STAGING_BUFFER", value)
    check(args("prefill"))


def test_loads_that_fail_past_the_transfer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which releases do is asked of each of them in tests/starts."""
    restoring = {
        "enable_hierarchical_cache": True,
        "disaggregation_decode_enable_radix_cache": True,
    }
    monkeypatch.setattr(layout, "restores_fail_alone", lambda: False)
    check(args(**restoring))
    monkeypatch.setattr(layout, "restores_fail_alone", lambda: True)
    with pytest.raises(ConfigError, match=r"--enable-hierarchical-cache.*0\.5\.22"):
        check(args(**restoring))
    check(args("prefill", **restoring))
    for name in restoring:
        check(args(**{name: True}))


def test_success_that_does_not_mean_landed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = release.Mooncake("0.3.11", "mooncake-transfer-engine", "tcp-v1")
    monkeypatch.setattr(release, "mooncake", lambda: old)
    with pytest.raises(ConfigError, match=r"0\.3\.11.*0\.3\.12"):
        check(args())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.5.12", (0, 5, 12)),
        ("0.5.12.post1", (0, 5, 12, 1)),
        ("0.3.13.post1+cpu", (0, 3, 13, 1)),
        ("unknown", ()),
    ],
)
def test_versions(text: str, parts: tuple[int, ...]) -> None:
    assert release.version_tuple(text) == parts


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that says nothing of transports; the folder lists its RDMA devices."""
    for name in list(os.environ):
        if name.startswith("MC_") or "MOONCAKE" in name or name == "USE_BAREX":
            monkeypatch.delenv(name)
    here = machine.Machine(MACHINES["a driver without devices"].under(tmp_path / "root"))
    monkeypatch.setattr(machine, "here", here)
    return here.root / "sys/class/infiniband"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MC_FORCE_MNNVL", "0"),  # Mooncake looks only whether it is set
        ("MC_INTRANODE_NVLINK", "1"),
        ("MC_USE_TENT", "1"),
        ("USE_BAREX", "1"),
        ("MOONCAKE_PROTOCOL", "efa"),
        ("ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE", "1"),
        ("SGLANG_MOONCAKE_CUSTOM_MEM_POOL", "NVLINK"),
    ],
)
def test_a_transport_nobody_has_proven_is_refused(
    bare: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    (bare / "mlx5_0").mkdir()
    assert release._unproven("mooncake-transfer-engine") == ""
    monkeypatch.setenv(name, value)
    problem = release._unproven("mooncake-transfer-engine")
    assert f"{name}={value}" in problem and "--plugin none" in problem
    found = release.Mooncake("0.3.13", "mooncake-transfer-engine", "rdma", problem)
    monkeypatch.setattr(release, "mooncake", lambda: found)
    with pytest.raises(ConfigError, match=name):
        check(args())
    monkeypatch.setenv("MC_FORCE_TCP", "1")  # skips all but another engine
    assert bool(release._unproven("mooncake-transfer-engine")) == (name == "MC_USE_TENT")


@pytest.mark.usefixtures("bare")
def test_without_rdma_a_gpu_build_may_choose_nvlink(monkeypatch: pytest.MonkeyPatch) -> None:
    assert release._unproven("mooncake-transfer-engine-non-cuda") == ""
    assert "MC_FORCE_TCP=1" in release._unproven("mooncake-transfer-engine")
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    assert release._unproven("mooncake-transfer-engine") == ""


def test_what_is_asked_for_and_what_a_wheel_always_does(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare / "mlx5_0").mkdir()
    monkeypatch.setenv("USE_BAREX", "0")
    monkeypatch.setenv("MOONCAKE_PROTOCOL", "")
    assert release._unproven("mooncake-transfer-engine") == ""
    assert "Ascend" in release._unproven("mooncake-transfer-engine-npu")
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    assert release._unproven("mooncake-transfer-engine-npu") == ""


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("wheel", "protocol", "forced", "needed"),
    [
        ("mooncake-transfer-engine", "rdma", False, True),
        ("mooncake-transfer-engine", "tcp-v2", False, True),  # it saw no device
        ("mooncake-transfer-engine", "tcp-v2", True, False),
        ("mooncake-transfer-engine-non-cuda", "rdma", False, True),
        ("mooncake-transfer-engine-non-cuda", "tcp-v2", False, False),
    ],
)
def test_an_rdma_device_that_mooncake_could_not_open_is_none(
    monkeypatch: pytest.MonkeyPatch, wheel: str, protocol: str, forced: bool, needed: bool
) -> None:
    """A container sees the host's devices; a port may be down. A CUDA build then takes NVLink."""
    found = release.Mooncake("0.3.13", wheel, protocol)
    monkeypatch.setattr(release, "mooncake", lambda: found)
    monkeypatch.setattr(server_args, "_is_mooncake", lambda manager: True)
    if forced:
        monkeypatch.setenv("MC_FORCE_TCP", "1")
    raw = SimpleNamespace(batch_transfer_async_write=None, get_batch_transfer_status=None)
    manager = SimpleNamespace(engine=SimpleNamespace(engine=raw))
    fence.record(manager.engine, {"port 1", "9: /dev/infiniband/uverbs0"})
    server_args._check_transport(manager)
    fence.record(manager.engine, {"port 1", "port 2"})
    if needed:
        with pytest.raises(ConfigError, match="MC_FORCE_TCP=1"):
            server_args._check_transport(manager)
    else:
        server_args._check_transport(manager)


@pytest.mark.parametrize("mode", ["null", "decode", "prefill"])
def test_after_the_start_every_place_is_looked_at_before_the_others_come_off(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(server_args, "_is_mooncake", lambda manager: False)
    monkeypatch.setattr(server_args, "require_in_place", lambda *a: called.append(("look", *a)))
    monkeypatch.setattr(server_args, "unwrap_other_roles", lambda *a: called.append(("off", *a)))
    queue = SimpleNamespace(kv_manager=None)
    scheduler = SimpleNamespace(
        disaggregation_mode=SimpleNamespace(value=mode),
        disagg_decode_prealloc_queue=queue,
        disagg_prefill_bootstrap_queue=queue,
    )
    server_args.check_in_force(scheduler)
    assert called == [("look", "safe-reclaim", mode, "both"), ("off", "safe-reclaim", mode)]


@pytest.mark.parametrize(
    ("shared", "named"),
    [
        ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend mooncake"),
        (
            {"enable_hierarchical_cache": True, "hicache_storage_backend": "mooncake"},
            "--hicache-storage-backend mooncake",
        ),
    ],
)
def test_a_fence_that_could_not_fall_is_refused_only_if_asked_for(
    shared: dict[str, Any], named: str
) -> None:
    check(args(**shared))
    with pytest.raises(ConfigError, match=rf"--safe-reclaim-fence.*{named}"):
        check(args(**shared), fence_asked=True)
    check(args(), fence_asked=True)
