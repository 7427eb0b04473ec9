"""Every HTTP route of every stock release: passed on by the retry proxy, or decided not to be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sglang_scaling_fixes.retry.routes import INFERENCE, READS, route
from tests.contract.wheels import RELEASES, source

ONE_WORKERS = frozenset(
    {
        # What one worker is, holds or does.
        "/health",
        "/health_generate",
        "/ready",
        "/get_server_info",
        "/server_info",
        "/get_load",
        "/list_external_corpora",
        "/hicache/storage-backend",
        "/get_hicache_l3_cache_layout",
        "/get_remote_instance_transfer_engine_info",
        "/remote_instance_transfer_engine_info",
        "/v1/responses/{response_id}",
        # They change it.
        "/flush_cache",
        "/clear_hicache_storage_backend",
        "/start_profile",
        "/stop_profile",
        "/set_trace_level",
        "/freeze_gc",
        "/start_expert_distribution_record",
        "/stop_expert_distribution_record",
        "/dump_expert_distribution_record",
        "/get_weights_by_name",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/weights_checker",
        "/slow_down",
        "/open_session",
        "/close_session",
        "/configure_logging",
        # Ollama's, whose streams cannot say that they were aborted.
        "/",
    }
)
"""GETs that no release's clients get through the proxy."""


def routes(release: str) -> list[tuple[str, str]]:
    """The methods and the path of each route, as the decorators of its function say them."""
    tree = ast.parse(Path(source(release), "sglang/srt/entrypoints/http_server.py").read_text())
    found = []
    for function in ast.walk(tree):
        for one in getattr(function, "decorator_list", []):
            first = one.args[0] if isinstance(one, ast.Call) and one.args else None
            if isinstance(first, ast.Constant) and str(first.value).startswith("/"):
                found.append((ast.unparse(one), str(first.value)))
    assert len(found) > 50
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_every_get_of_stock_is_decided(release: str) -> None:
    for how, path in routes(release):
        if "app.get(" not in how and "'GET'" not in how:
            continue
        passed_on = path in READS or path == "/v1/models/{model:path}"
        assert passed_on or path in ONE_WORKERS, f"{path} of {release}: pass it on, or refuse it"
        assert passed_on is not (path in ONE_WORKERS)
        assert (route("GET", path.replace("{model:path}", "m")) is not None) is passed_on


@pytest.mark.parametrize("release", RELEASES)
def test_what_changes_a_worker_is_never_passed_on(release: str) -> None:
    """What a route changes cannot be read. Those that stock's operators alone may use can."""
    for how, path in routes(release):
        if "ADMIN" in how or any(word in path for word in ("clear", "flush", "profile", "weights")):
            assert path not in INFERENCE and path not in READS


def test_each_read_is_some_releases() -> None:
    assert {path for release in RELEASES for _, path in routes(release)} >= READS
