"""Which servers it is not made for: one line with the flag, the value and the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_scaling_fixes import metrics
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.layersplit import server_args
from sglang_scaling_fixes.layersplit.attach import in_place
from sglang_scaling_fixes.layersplit.scratch import Size
from tests.layersplit.stand_ins import Pool, module, pool_module

SOUND = {
    "enable_dsa_cache_layer_split": True,
    "disaggregation_mode": "prefill",
    "device": "cuda",
    "chunked_prefill_size": 8192,
    "kv_cache_dtype": "fp8_e4m3",
    "page_size": 64,
    "dsa_prefill_backend": "flashmla_sparse",
    "cuda_graph_backend_prefill": "disabled",
    "pp_size": 1,
    "dcp_size": 1,
    "enable_hisparse": False,
    "hicache_storage_backend": None,
}


def server(**more: Any) -> Any:
    return SimpleNamespace(**{**SOUND, **more})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"device": "cpu", "kv_cache_dtype": "auto", "page_size": None, "dsa_prefill_backend": None},
        {"chunked_prefill_size": None, "cuda_graph_backend_prefill": None, "pp_size": None},
        {"enable_hierarchical_cache": True},
    ],
)
def test_a_sound_server_passes(more: dict[str, Any]) -> None:
    server_args.check(server(**more))


def test_one_of_an_older_release_has_not_all_fields() -> None:
    found = server()
    for field in ("dcp_size", "enable_hisparse", "cuda_graph_backend_prefill"):
        delattr(found, field)
    server_args.check(found)


TABLE: list[tuple[str, Any, str]] = [
    *((field, 2, "set it to 1,") for field in server_args._ONE),
    *((field, True, "drop it,") for field in server_args._OFF if field.startswith("enable")),
    ("hicache_storage_backend", "mooncake", "drop it,"),
    ("device", "npu", "set it to cuda,"),
    ("device", "xpu", "set it to cuda,"),
    ("chunked_prefill_size", -1, "set it to a number of tokens,"),
    ("chunked_prefill_size", 0, "set it to a number of tokens,"),
    ("kv_cache_dtype", "fp8_e5m2", "set it to auto or fp8_e4m3,"),
    ("page_size", 1, "set it to 64,"),
    ("page_size", 128, "set it to 64,"),
    *(
        ("dsa_prefill_backend", backend, "set it to flashmla_sparse or fa3,")
        for backend in server_args._BACKENDS
    ),
    *(
        ("cuda_graph_backend_prefill", backend, "set it to disabled,")
        for backend in ("full", "breakable", "tc_piecewise")
    ),
]


def test_the_table_has_every_field_that_is_looked_at() -> None:
    listed = {field for field, _, _ in TABLE}
    assert listed >= {*server_args._ONE, *server_args._OFF}
    assert {v for f, v, _ in TABLE if f == "dsa_prefill_backend"} == set(server_args._BACKENDS)


def refused(**more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        server_args.check(server(**more))
    line = str(caught.value)
    assert "\n" not in line and line.endswith("start without layer-split")
    return line


@pytest.mark.parametrize(("field", "value", "remedy"), TABLE, ids=str)
def test_a_refusal_names_flag_value_and_remedy(field: str, value: Any, remedy: str) -> None:
    line = refused(**{field: value})
    assert line.startswith(f"--{field.replace('_', '-')} {value}: ")
    assert remedy in line


def test_rocm_calls_its_devices_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    server_args.check(server())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert refused().startswith("--device rocm: ")


@pytest.mark.parametrize("role", ["null", "prefill"])
def test_a_server_without_a_split_says_where_it_belongs(role: str) -> None:
    line = refused(enable_dsa_cache_layer_split=False, disaggregation_mode=role)
    assert line.startswith("--enable-dsa-cache-layer-split: not given")
    assert f"({role})" in line and "prefill server" in line


# -- what stock made of it -----------------------------------------------------------------


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    pool_module(monkeypatch)
    made = Pool(Size(4, 4))
    monkeypatch.setattr(server_args, "require_in_place", lambda *_: None)
    monkeypatch.setattr(metrics, "of_scheduler", lambda *_: made.stats)
    return made


def in_force(
    pool: Any, monkeypatch: pytest.MonkeyPatch, role: str = "prefill", **resolved: Any
) -> None:
    """`resolved`: what stock has settled on where the operator gave nothing."""
    monkeypatch.setattr(server_args, "resolved", lambda _, name: resolved.get(name))
    runner = SimpleNamespace(token_to_kv_pool=pool)
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner),
        disaggregation_mode=SimpleNamespace(value=role),
    )
    server_args.check_in_force(scheduler, server(dsa_prefill_backend=None))


def graphs(backend: str) -> Any:
    """Stock's `CudaGraphConfig`, whose backends are words."""
    return SimpleNamespace(prefill=SimpleNamespace(backend=backend))


def test_a_decode_of_the_fleet_keeps_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for all servers may name the fix: decode has every layer, by its nature."""
    server_args.check(server(enable_dsa_cache_layer_split=False, disaggregation_mode="decode"))
    taken_off: list[tuple[str, str]] = []
    monkeypatch.setattr(server_args, "unwrap_other_roles", lambda *what: taken_off.append(what))
    pool_module(monkeypatch)
    in_force(object(), monkeypatch, role="decode")
    assert taken_off == [("layer-split", "decode")]


def test_what_stock_chose_passes(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.device = "cuda"
    chosen = {"dsa_prefill_backend": "flashmla_kv", "cuda_graph_config": graphs("disabled")}
    in_force(pool, monkeypatch, **chosen)
    in_force(pool, monkeypatch)  # a release without such graphs


def test_a_backend_that_stock_chose_is_refused_as_one_that_was_given(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--dsa-prefill-backend trtllm: .* set it to"):
        in_force(pool, monkeypatch, dsa_prefill_backend="trtllm")


def test_prefill_graphs_in_force_are_refused_on_a_gpu(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force(pool, monkeypatch, cuda_graph_config=graphs("breakable"))
    pool.device = "cuda"
    with pytest.raises(ConfigError, match=r"--cuda-graph-backend-prefill breakable: .* disabled"):
        in_force(pool, monkeypatch, cuda_graph_config=graphs("breakable"))


@pytest.mark.parametrize("ours", [True, False])
def test_a_pool_that_is_not_split_is_said_with_the_flags_that_split_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    kind = Pool if ours else object
    name = "sglang.srt.mem_cache.dsa_cache_layer_split"
    module(monkeypatch, name, LayerSplitDSATokenToKVPool=kind)
    assert in_place() is ours
    with pytest.raises(ConfigError, match=r"stock built object .*--enable-prefill-cp") as caught:
        in_force(object(), monkeypatch)
    assert ("put in its place by something else" in str(caught.value)) is not ours
