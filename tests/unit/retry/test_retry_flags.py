"""What the flags may say, which paths go through, and what the proxy knows of stock's."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_scaling_fixes import cli
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.retry.listener import (
    FILES_PER_REQUEST,
    MOST_IN_FLIGHT,
    RESERVED_FILES,
    in_flight_limit,
)
from sglang_scaling_fixes.retry.routes import INFERENCE, READ, route
from sglang_scaling_fixes.retry.servers import Role
from sglang_scaling_fixes.retry.settings import checked_settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--worker"),
        (["--worker", "http://a:1/", "--worker", "http://a:1"], "twice"),
        (["--worker", "http://A:1", "--pd", "prefill=http://a:1,decode=http://b:1"], "twice"),
        (["--pd", "prefill=http://a:1,decode=http://a:1"], "twice"),
        (["--worker", "http://a:1/v1"], "path"),
        (["--worker", "http://a:1?x=y"], "path"),
        (["--worker", "a:1"], "http://HOST:PORT"),
        (["--worker", "ftp://a:1"], "http://HOST:PORT"),
        (["--worker", "http://a:x"], "http://HOST:PORT"),
        (["--worker", "http://"], "http://HOST:PORT"),
        (["--worker", "http://a b:1"], "http://HOST:PORT"),
        (["--worker", "http://me:secret@a:1"], "user"),
        (["--pd", "prefill=http://a:1"], "decode=URL"),
        (["--pd", "prefill=http://a:1,decode=http://b:1,room=3"], "room=3"),
        (["--pd", "prefill=http://a:1,decode=http://b:1,decode=http://c:1"], "decode is given"),
        (["--pd", "prefill=http://a:1,decode=http://b:1,bootstrap-port=0"], "1 to 65535"),
        (["--pd", "http://a:1"], "prefill=URL"),
        (["--pd", "prefill=dns+http://a:1,decode=http://b:1"], "--prefill"),
        (["--prefill", "http://a:1"], "--decode URL"),
        (["--decode", "http://a:1"], "--prefill URL"),
        (["--prefill", "http://a:1", "--pd", "prefill=http://b:1,decode=http://c:1"], "--decode"),
        (["--prefill", "http://a:1,port=3"], "port=3"),
        (["--decode", "http://a:1,bootstrap-port=3"], "bootstrap-port=3"),
        (["--workers-file", "/absent"], "--workers-file /absent"),
        (["--worker", "http://a:1", "--secret-file", "/absent"], "--secret-file /absent"),
        (["--worker", "http://a:1", "--retry-status", "500,many"], "--retry-status '500,many'"),
        (["--worker", "http://a:1", "--retry-status", "200"], "--retry-status '200'"),
        (["--worker", "http://a:1", "--admin-port", "x"], "--admin-port 'x'"),
        (["--worker", "http://a:1", "--max-inflight", "999999"], "ulimit -n"),
        (["--worker", "http://a:1", "--attempts", "0"], "--attempts '0'"),
        (["--worker", "http://a:1", "--hold-tokens", "-1"], "--hold-tokens '-1'"),
        (["--worker", "http://a:1", "--hold-tokens", "many"], "--hold-tokens 'many'"),
        (["--worker", "http://a:1", "--idle-timeout", "0"], "--idle-timeout '0'"),
        (["--worker", "http://a:1", "--idle-timeout", "nan"], "--idle-timeout 'nan'"),
        (["--worker", "http://a:1", "--max-body-bytes", "0"], "--max-body-bytes '0'"),
        (["--worker", "http://a:1", "--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_a_bad_flag_is_named_with_its_value_and_the_remedy(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["retry-proxy", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_good_flags(tmp_path: Path) -> None:
    listed = tmp_path / "workers"
    listed.write_text(
        "# the fleet\n\nworker http://f:1 # one\n  decode http://d2:2\n"
        "prefill dns+http://prefills:30000,bootstrap-port=7\n"
    )
    chosen = checked_settings(
        {
            "worker": ["http://[::1]:30000", "https://w"],
            "pd": ["prefill=http://[fe80::1]:1,decode=http://d:2,bootstrap-port=9"],
        },
        workers_file=str(listed),
        retry_status="503, 429",
        host="[::1]",
        attempts="5",
        idle_timeout=2.5,
    )
    assert [server.url for server in chosen.servers] == [
        "http://[::1]:30000",
        "https://w:443",
        "http://[fe80::1]:1",
        "http://d:2",
        "http://f:1",
        "http://d2:2",
        "http://prefills:30000",
    ]
    prefill, decode = chosen.servers[2:4]
    assert (prefill.host, prefill.bootstrap_port) == ("[fe80::1]", 9)
    assert prefill.group == decode.group and prefill.role is Role.PREFILL
    named = chosen.servers[6]
    assert named.dns and named.bootstrap_port == 7 and named.group == ""
    assert named.at("fd00::2").url == "http://[fd00::2]:30000" and not named.at("::2").dns
    assert (chosen.attempts, chosen.idle_timeout) == (5, 2.5)
    assert (chosen.retry_status, chosen.host) == (frozenset({503, 429}), "::1")
    with pytest.raises(ConfigError):
        checked_settings({"worker": ["http://a:1"]}, port=70_000)


@pytest.mark.parametrize("line", ["worker", "worker a:1", "server http://a:1", "pd http://a:1"])
def test_a_bad_line_of_a_file_is_named(line: str, tmp_path: Path) -> None:
    listed = tmp_path / "workers"
    listed.write_text(f"worker http://w:1\n{line}\n")
    with pytest.raises(ConfigError, match=r"line 2|--worker|--pd"):
        checked_settings({}, workers_file=str(listed))


def test_requests_in_flight_are_what_the_open_files_allow() -> None:
    assert in_flight_limit(0, 1024) == (1024 - RESERVED_FILES) // FILES_PER_REQUEST
    assert in_flight_limit(10, 1024) == 10 and in_flight_limit(0, 1 << 31) == MOST_IN_FLIGHT
    with pytest.raises(ConfigError, match=r"--max-inflight 1024: .*ulimit -n"):
        in_flight_limit(1024, 1024)


def test_without_its_packages_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; from sglang_scaling_fixes import cli;"
        "sys.exit(cli.main(['retry-proxy', '--worker', 'http://a:1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'sglang-scaling-fixes[proxy]'" in done.stderr


def test_the_command_line_imports_no_server() -> None:
    code = "import sys, sglang_scaling_fixes.cli as c; c._parser(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"aiohttp", "uvicorn", "orjson"} & set(found.stdout.split())


# Stock's paths


def stock_routes() -> list[tuple[str, str]]:
    """Of every route of the installed SGLang: its function's decorators, and its path."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    tree = ast.parse((folder / "srt/entrypoints/http_server.py").read_text())
    found = []
    for function in ast.walk(tree):
        decorators = getattr(function, "decorator_list", [])
        words = " ".join(ast.unparse(one) for one in decorators)
        for one in decorators:
            first = one.args[0] if isinstance(one, ast.Call) and one.args else None
            if isinstance(first, ast.Constant) and str(first.value).startswith("/"):
                found.append((words, str(first.value)))
    assert len(found) > 60
    return found


NOT_SPREAD = {
    # of one worker's state, and open to everyone in stock
    "/open_session",
    "/close_session",
    "/v1/responses/{response_id}/cancel",
}


def test_every_open_path_of_stock_is_known() -> None:
    """What stock guards as administration is nobody's inference; the rest is decided here."""
    for how, path in stock_routes():
        posts = "app.post" in how or "'POST'" in how
        if "ADMIN" in how or "{method}" in path:
            assert path not in INFERENCE, path
        elif posts and path not in NOT_SPREAD:
            assert path in INFERENCE, path


def test_paths_of_the_proxy_are_stocks() -> None:
    stock = {path for _, path in stock_routes()} | {"/invocations", "/vertex_generate"}
    assert set(INFERENCE) <= stock


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/flush_cache"),
        ("DELETE", "/generate"),
        ("GET", "/flush_cache"),
        ("GET", "/clear_hicache_storage_backend"),
        ("GET", "/server_info"),
        ("GET", "/v1/responses/resp_1"),
        ("GET", "/docs"),
        *((method, path) for method in ("GET", "POST", "OPTIONS") for path in (
            "//generate",
            "/x/../generate",
            "/./generate",
            "/generate/",
            "/generate;a",
            "/v1//models",
            "/v1/models/../../flush_cache",
            "/v1/models/..%2fflush_cache",
            "/%67enerate",
            "/generate%00",
            "\\generate",
            "/generate#",
            "generate",
            "*",
            "",
        )),
    ],
)  # fmt: skip
def test_what_is_not_meant_to_go_through_does_not(method: str, path: str) -> None:
    assert route(method, path) is None


def test_what_is_meant_to_go_through_does() -> None:
    assert route("POST", "/generate") is route("PUT", "/generate") is INFERENCE["/generate"]
    for path in ("/v1/models", "/v1/models/zai-org/GLM-5.1:v1", "/get_model_info"):
        assert route("GET", path) is route("HEAD", path) is route("OPTIONS", path) is READ
    assert route("OPTIONS", "/v1/chat/completions") is READ
