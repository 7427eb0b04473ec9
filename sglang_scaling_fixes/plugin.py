"""What the plugin does in each process of a server, once `entry.py` has handed over to it.

    launch_server    activate -> flags added; flags parsed -> checked, into the environment
    scheduler child  activate -> environment read, fixes attached and proven
    other children   activate -> nothing, unless a scheduler is built there after all
                     Scheduler.__init__ -> what was asked is in force here, or the start stops
    main process     every scheduler's states come back with its "ready" message

Stock's loader swallows any `Exception` a plugin raises and starts the server without
it. So everything that must stop a start leaves here as `SystemExit`.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from sglang_scaling_fixes import (
    fixes,
    flags,
    http,
    import_hooks,
    metrics,
    points,
)
from sglang_scaling_fixes.attach import require_in_place, wrap
from sglang_scaling_fixes.config import ENV_PREFIX, PLUGIN_ENV, PLUGIN_FLAG, Config
from sglang_scaling_fixes.errors import ScalingFixesError
from sglang_scaling_fixes.fix import Fix
from sglang_scaling_fixes.presence import exists

logger = logging.getLogger(__name__)

LOADER = "sglang.srt.plugins"
"""Stock's plugin loader, from 0.5.11 on. `loading_probe` has the name too: it runs without this
package, and no server imports it."""
REPORT_KEY = "sglang_scaling_fixes"
"""Our key in `/server_info` and in what schedulers report to the main process."""


@dataclass
class _Process:
    """What happened in this process so far."""

    activated: bool = False
    first: Config | None = None
    """What it was armed for first: the settings that what is attached was attached with."""
    config: Config | None = None
    """What it was armed for last; None while nothing was ever armed."""
    awaited: Config | None = None
    """What it will be armed for once that is needed here (`_arm_when_needed`)."""
    hooked: set[str] = field(default_factory=set)
    """The hooks of ours that are in place."""
    refused: str | None = None
    """The line of a refused arming. What it had attached by then stays, so nothing starts here."""
    statuses: list[fixes.Status] = field(default_factory=list)


_process = _Process()


def activate() -> None:
    """Called by `entry.activate`. Stops the process rather than fail open."""
    with _stopping():
        if not _process.activated:
            _wrap_command_line()  # first: what cannot be read now is read again with the flags
            _process.activated = True
        config = flags.from_env()
        if _process.config is None and config.armed and _without_kv():
            _arm_when_needed(config)
        else:
            _arm_process(config)


def _without_kv() -> bool:
    """Whether a function on this thread's stack is one that needs no fix (`points.WITHOUT_KV`).

    It is one that called stock's loader. Any other process is armed at once, also one that
    nobody has heard of.
    """
    known = {tuple(point.target.split(":")) for point in points.WITHOUT_KV}
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_qualname) in known:
            return True
        frame = frame.f_back
    return False


def _arm_when_needed(config: Config) -> None:
    """Arm not now, but before a scheduler is built or a server launched here, whoever does it."""
    _process.awaited = config
    for point, hook in ((points.SCHEDULER_INIT, _hook_scheduler), (points.LAUNCH, _hook_launch)):
        module = point.target.partition(":")[0]
        import_hooks.after_import(module, partial(_call, hook))


def _call(hook: Callable[[], None], _module: object) -> None:
    hook()


@contextlib.contextmanager
def _stopping(what: str = "") -> Iterator[None]:
    """Turn any failure of ours into the end of this process, in one line."""
    try:
        yield
    except ScalingFixesError as error:
        stop(f"{what}{error}")
    except Exception as error:
        logger.exception("sglang-scaling-fixes failed where it must not")
        stop(f"{what}{type(error).__name__}: {error}")


def stop(message: str) -> NoReturn:
    """End this process with one line on stderr, exit status 1."""
    raise SystemExit(f"sglang-scaling-fixes: {message}")


def activated() -> bool:
    """Whether SGLang has called this plugin in this process."""
    return _process.activated


def statuses() -> list[dict[str, str]]:
    """What is in force in this process."""
    return [status.as_dict() for status in _process.statuses]


# -- main process: flags ------------------------------------------------------------


def _wrap_command_line() -> None:
    def add_cli_args(stock: Callable[..., Any], parser: Any) -> Any:
        result = stock(parser)
        flags.add_flags(parser)
        return result

    def from_cli_args(stock: Callable[..., Any], cls: Any, args: Any) -> Any:
        flags.flags_to_env(args)
        with _stopping():
            config = flags.from_env()
        if config.fixes is None:
            logger.info("sglang-scaling-fixes is installed and not armed; add --plugin to arm it")
        server_args = stock(cls, args)
        with _stopping():
            _arm_process(config, server_args)
            if config.armed:
                _check_server_args(server_args, config)
                for fix in fixes.asked(config):
                    require_in_place(fix.name, "server")
        return server_args

    wrap(points.ADD_FLAGS, add_cli_args)
    wrap(points.READ_FLAGS, from_cli_args)


def _check_server_args(server_args: Any, config: Config) -> None:
    for fix in fixes.asked(config):
        with _stopping_for(fix, server_args, config):
            fix.check(server_args, config)


@contextlib.contextmanager
def _stopping_for(fix: Fix, server_args: Any, config: Config) -> Iterator[None]:
    """What `fix` refuses for this server ends the process, and says what would not be refused."""
    with _stopping(f"{fix.name}: "):
        try:
            yield
        except ScalingFixesError as error:
            others = [other.name for other in fixes.asked(config) if other is not fix]
            raise ScalingFixesError(_instead(str(error), others, server_args)) from error


def _instead(refusal: str, names: Sequence[str], server_args: Any) -> str:
    """`refusal`, with those of the fixes `names` that would start here if asked for by name.

    `server_args`: None while they are not known. A refusal may say itself that a server starts
    with none. Where a setting would arm the fix that refuses all the same, it stays as it is.
    """
    would = [fix.name for fix in fixes.FIXES if fix.name in names and _passes(fix, server_args)]
    if flags.by_name(would) is None:
        return refusal
    nothing, others = f"{PLUGIN_FLAG} none", f"{PLUGIN_FLAG} {','.join(would) or 'none'}"
    if nothing in refusal:
        return refusal.replace(nothing, others)
    return f"{refusal}; or start with {others}"


def _passes(fix: Fix, server_args: Any) -> bool:
    named = flags.by_name((fix.name,))
    try:
        if named is not None and server_args is not None:
            fix.check(server_args, named)
    except Exception:  # a check that breaks promises nothing
        return False
    return named is not None


# -- every process: fixes -------------------------------------------------------------


def _arm_process(config: Config, server_args: Any = None) -> None:
    """What is in force in this process is what `config` asks for, or the process ends.

    It may be asked again: by flags after the environment, or by a caller that caught the end of
    an earlier try. A refusal is for good, and nothing that was attached is taken off.
    """
    if _process.refused is not None:
        raise SystemExit(_process.refused)
    if _process.awaited is not None:
        awaited, _process.awaited = _process.awaited, None
        _arm_process(awaited)
    before = _process.config
    if config == before or not (config.armed or before):
        return
    if before is not None and not set(before.fixes or ()) <= set(config.fixes or ()):
        stop(
            f"this process was armed for {', '.join(before.fixes or ())} before it was asked for "
            f"{', '.join(config.fixes or ()) or 'none'}, and what is attached stays; ask for the "
            f"same in {PLUGIN_ENV} and {PLUGIN_FLAG}, or start a new "
            "process"
        )
    try:
        with _stopping():
            _attach(config, server_args, again=before is not None)
    except SystemExit as end:
        _process.refused = str(end.code)
        raise
    _process.first = _process.first or config
    _process.config = config


def _attach(config: Config, server_args: Any, *, again: bool) -> None:
    """Attach and prove the fixes, and hook the places where the states are reported."""
    launches = multiprocessing.parent_process() is None  # a child launches nothing
    if not again:  # before the fixes: after a refusal nothing may start here either
        _hook_scheduler()
        if launches:
            _hook_launch()
    _process.statuses = fixes.arm_all(config)
    if (line := fixes.refusal(_process.statuses, config)) is not None:
        held = [status.name for status in _process.statuses if status.in_force]
        stop(_instead(line, held, server_args))
    if launches and not again:
        edits = [edit for fix in fixes.FIXES for edit in fix.error_edits()]
        routes = {path: answer for fix in fixes.FIXES for path, answer in fix.routes().items()}
        judges = [fix.unready for fix in fixes.FIXES]
        http.attach(edits, judges, REPORT_KEY, routes, _middleware)


def _middleware() -> list[Any]:
    """Of what is in force in this process when its application is run."""
    return [each for fix in fixes.asked(_process.config or Config()) for each in fix.middleware()]


def _once(hook: str) -> bool:
    """Whether this hook is to be put in place now."""
    new = hook not in _process.hooked
    _process.hooked.add(hook)
    return new


def _hook_scheduler() -> None:
    def scheduler_init(
        stock: Callable[..., Any], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = _config_of_a_scheduler()
        _check_server_args(server_args, config)
        try:
            result = stock(scheduler, server_args, *args, **kwargs)
        except ScalingFixesError as error:  # a fix refused what stock was building
            fix = fixes.raised_by(error)
            if fix is None:
                stop(str(error))
            with _stopping_for(fix, server_args, config):
                raise
        _check_scheduler(scheduler, server_args, config)
        for status in _process.statuses:
            if status.state is not fixes.FixState.OFF:
                logger.info(
                    "sglang-scaling-fixes: %s %s (%s)", status.name, status.state, status.reason
                )
        if server_args.enable_metrics:
            metrics.export_states((s.name, s.state.value) for s in _process.statuses)
        return result

    def get_init_info(stock: Callable[..., Any], scheduler: Any) -> Any:
        return {**stock(scheduler), REPORT_KEY: statuses()}

    def get_internal_state(stock: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
        output = stock(scheduler, recv_req)
        output.internal_state[REPORT_KEY] = _live_report()
        return output

    if _once("scheduler"):
        wrap(points.SCHEDULER_INIT, scheduler_init)
        wrap(points.INIT_INFO, get_init_info)
        wrap(points.INTERNAL_STATE, get_internal_state)


def _config_of_a_scheduler() -> Config:
    """What a scheduler in this process runs with. Stops where it would not be what was asked last.

    The main process may be armed by the environment first and by flags after that; its children
    read what was asked last. A scheduler in the same process would keep the first settings.
    """
    if _process.refused is not None:
        raise SystemExit(_process.refused)
    if _process.awaited is not None:
        _arm_process(_process.awaited)
    first, last = _process.first, _process.config
    if first is None or last is None:
        stop("a scheduler starts in a process that was never armed")
    if replace(first, fixes=last.fixes, named=last.named) != last:
        stop(
            "a scheduler in the process that was armed by the environment first and then with "
            f"other settings by flags; give them as {ENV_PREFIX}... variables only"
        )
    return last


def _hook_launch() -> None:
    def launch_subprocesses(stock: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _stopping():  # the children read the environment of now
            _arm_process(flags.from_env())
        # A patched release has no loader that could leave us out.
        if exists(LOADER) and (problem := flags.left_out()) is not None:
            stop(f"no scheduler process would load this plugin: {problem}")
        result = stock(cls, *args, **kwargs)
        _check_children(kwargs.get("server_args", args[0] if args else None), result)
        return result

    if _once("launch"):
        wrap(points.LAUNCH, launch_subprocesses)


def _check_scheduler(scheduler: Any, server_args: Any, config: Config) -> None:
    """After stock built its scheduler: what the fixes need of it is there."""
    for fix in fixes.asked(config):
        with _stopping_for(fix, server_args, config):
            fix.bind(scheduler, server_args, config)


def _check_children(server_args: Any, launched: Any) -> None:
    """Every scheduler that reported ready also reported what it has in force.

    With data parallelism a controller relays a summary of its own; its schedulers
    have checked themselves.
    """
    if getattr(server_args, "dp_size", 1) != 1:
        return
    for part in launched if isinstance(launched, tuple) else (launched,):
        for info in getattr(part, "scheduler_infos", None) or ():
            if REPORT_KEY not in info:
                stop("a scheduler process started without the plugin; is SGLANG_PLUGINS set?")


def _live_report() -> dict[str, Any]:
    report: dict[str, Any] = {"fixes": statuses()}
    for fix in fixes.asked(_process.config or Config()):
        report |= fix.report() or {}
    return report
