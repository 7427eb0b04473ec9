"""The plugin's own attach points: where flags come in, servers start, and states go out."""

from __future__ import annotations

from sglang_scaling_fixes.attach import AttachPoint, catalogue

NAME = "plugin"

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"

ADD_FLAGS = AttachPoint(
    NAME, "server", "sglang.srt.server_args:ServerArgs.add_cli_args", ("parser",)
)
READ_FLAGS = AttachPoint(
    NAME, "server", "sglang.srt.server_args:ServerArgs.from_cli_args", ("args",)
)
LAUNCH = AttachPoint(NAME, "server", "sglang.srt.entrypoints.engine:Engine._launch_subprocesses")
RUN_HTTP = AttachPoint(
    NAME, "server", "sglang.srt.entrypoints.http_server:_setup_and_run_http_server"
)
# Asked for what the schedulers report.
GLOBAL_STATE = AttachPoint(
    NAME, "server", "sglang.srt.entrypoints.http_server:get_global_state", wrapped=False
)
SCHEDULER_INIT = AttachPoint(
    NAME, "both", f"{_SCHEDULER}.__init__", ("server_args",), uses=("tree_cache", "tp_worker")
)
INIT_INFO = AttachPoint(NAME, "both", f"{_SCHEDULER}.get_init_info")
INTERNAL_STATE = AttachPoint(NAME, "both", f"{_SCHEDULER}.get_internal_state", ("recv_req",))

_MANAGERS = "sglang.srt.managers"
DETOKENIZER = AttachPoint(
    NAME, "server", f"{_MANAGERS}.detokenizer_manager:run_detokenizer_process", wrapped=False
)
CONTROLLER = AttachPoint(
    NAME,
    "server",
    f"{_MANAGERS}.data_parallel_controller:run_data_parallel_controller_process",
    wrapped=False,
)
WITHOUT_KV = (DETOKENIZER, CONTROLLER)
"""What runs in the child processes of a server that have no KV cache and speak no HTTP. From 0.5.22
on they load plugins too."""

ATTACH_POINTS = catalogue(vars())
