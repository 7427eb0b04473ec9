"""What is in force in a process is what it is asked for, however often it is asked, or it ends."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_scaling_fixes import (
    fixes,
    flags,
    http,
    import_hooks,
    ordering,
    plugin,
    points,
    specguard,
)
from sglang_scaling_fixes.attach import AttachPoint
from sglang_scaling_fixes.config import ENV_PREFIX, PLUGIN_ENV, Config
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.fix import Fix
from sglang_scaling_fixes.fixes import SETTINGS, FixState, Status
from sglang_scaling_fixes.specguard.flags import ACTION

CHECK_SERVER_ARGS = plugin._check_server_args

LAUNCH = points.LAUNCH.target
FLAGS = points.READ_FLAGS.target
SCHEDULER = points.SCHEDULER_INIT.target
DEFAULT, BOTH = "safe-reclaim", "safe-reclaim,spec-guard"


class Process:
    """A process of a server, as the plugin sees it. Stock is what notes that it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hooks: dict[str, Callable[..., Any]] = {}
        self.armed: list[Config] = []
        self.started: list[str] = []
        self.broken: set[str] = set()
        self.env = monkeypatch
        monkeypatch.setattr(plugin, "_process", plugin._Process())
        monkeypatch.setattr(plugin, "wrap", self._wrap)
        monkeypatch.setattr(plugin, "require_in_place", lambda *_: None)
        monkeypatch.setattr(plugin, "_check_server_args", lambda *_: None)
        monkeypatch.setattr(plugin, "_check_scheduler", lambda *_: None)
        monkeypatch.setattr(http, "attach", lambda *_: None)
        monkeypatch.setattr(fixes, "arm_all", self._arm_all)
        for name in (PLUGIN_ENV, *(s.env for s in SETTINGS)):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("SGLANG_PLUGINS", raising=False)

    def _wrap(self, point: AttachPoint, around: Callable[..., Any]) -> None:
        target = point.target
        assert target not in self.hooks, f"{target} is wrapped twice"
        self.hooks[target] = around

    def _arm_all(self, config: Config) -> list[Status]:
        self.armed.append(config)
        states = dict.fromkeys(config.fixes or (), FixState.ARMED)
        states |= dict.fromkeys(self.broken & states.keys(), FixState.UNSUPPORTED)
        return [Status(name, state, "because") for name, state in states.items()]

    def flags(self, *argv: str) -> Any:
        """`launch_server` with these flags, up to stock's own arguments."""
        parser = argparse.ArgumentParser()
        flags.add_flags(parser)
        args = parser.parse_args(argv)
        for name in (PLUGIN_ENV, *(s.env for s in SETTINGS)):
            if getattr(args, name.lower(), None) is not None:
                self.env.setenv(name, "")  # the plugin writes it; this takes it back at the end
        return self.hooks[FLAGS](self._stock("arguments"), object, args)

    def launch(self) -> None:
        self.hooks[LAUNCH](self._stock("children"), object, SimpleNamespace(dp_size=2))

    def scheduler(self) -> None:
        args = SimpleNamespace(enable_metrics=False)
        self.hooks[SCHEDULER](self._stock("scheduler"), object(), args)

    def _stock(self, what: str) -> Callable[..., Any]:
        def stock(*_: Any, **__: Any) -> str:
            self.started.append(what)
            return what

        return stock


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(monkeypatch)


def line(call: Callable[..., Any], *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        call(*args)
    text = str(ended.value.code)
    assert text.startswith("sglang-scaling-fixes: ") and "\n" not in text
    return text


def test_a_refusal_is_for_good(process: Process) -> None:
    """A notebook catches the end of the process and tries again."""
    process.broken = {"safe-reclaim"}
    plugin.activate()
    first = line(process.flags, "--plugin", BOTH)
    assert "safe-reclaim: because" in first
    process.broken = set()
    assert line(process.flags, "--plugin", BOTH) == first
    assert line(process.flags, "--plugin", "spec-guard") == first
    assert line(process.flags, "--plugin", "none") == first
    assert line(process.launch) == first
    assert line(process.scheduler) == first
    assert line(plugin.activate) == first
    assert len(process.armed) == 1
    assert not {"children", "scheduler"} & set(process.started)


def test_a_refusal_by_the_environment_is_for_good_too(process: Process) -> None:
    """Stock's loader calls a plugin once; after that only what we hooked can say no."""
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    process.broken = {"safe-reclaim"}
    first = line(plugin.activate)
    process.broken = set()
    assert line(process.flags) == first
    assert line(process.launch) == first


def test_a_variable_that_cannot_be_read_is_read_again_with_the_flags(process: Process) -> None:
    process.env.setenv(PLUGIN_ENV, "safe-reclam")
    assert "safe-reclam" in line(plugin.activate)
    assert "safe-reclam" in line(process.flags)
    assert process.started == []


def test_the_same_again_is_armed_once(process: Process) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    plugin.activate()
    plugin.activate()
    process.flags()
    process.launch()
    assert len(process.armed) == 1
    assert process.started == ["arguments", "children"]


def test_flags_that_ask_for_more_than_the_environment_are_armed_too(process: Process) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    plugin.activate()
    process.flags("--plugin", BOTH)
    assert [s["name"] for s in plugin.statuses()] == ["safe-reclaim", "spec-guard"]
    process.launch()
    process.scheduler()
    assert process.started == ["arguments", "children", "scheduler"]


def test_what_flags_ask_for_on_top_is_refused_as_ever(process: Process) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    process.broken = {"spec-guard"}
    plugin.activate()
    assert "spec-guard: because" in line(process.flags, "--plugin", BOTH)
    assert "spec-guard: because" in line(process.flags, "--plugin", DEFAULT)


@pytest.mark.parametrize("less", ["safe-reclaim", "hicache-ordering", "none"])
def test_flags_that_ask_for_less_than_is_attached_stop_the_start(
    process: Process, less: str
) -> None:
    process.env.setenv(PLUGIN_ENV, BOTH)
    plugin.activate()
    text = line(process.flags, "--plugin", less)
    for word in (f"armed for {BOTH.replace(',', ', ')}", less, PLUGIN_ENV, "--plugin"):
        assert word in text


def test_other_settings_reach_the_children_and_no_scheduler_of_this_process(
    process: Process,
) -> None:
    """What is attached keeps the settings it was attached with; children start afresh."""
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    plugin.activate()
    process.scheduler()
    process.flags("--safe-reclaim-fence", "off")
    process.launch()
    text = line(process.scheduler)
    assert "settings" in text and ENV_PREFIX in text
    assert process.started == ["scheduler", "arguments", "children"]


def test_nothing_is_launched_that_would_not_load_us(process: Process) -> None:
    plugin.activate()
    process.flags("--plugin", DEFAULT)
    process.env.setenv("SGLANG_PLUGINS", "other")
    text = line(process.launch)
    assert "SGLANG_PLUGINS=other" in text and "scaling_fixes" in text
    process.env.setenv("SGLANG_PLUGINS", "scaling_fixes")
    process.launch()
    assert process.started == ["arguments", "children"]


@pytest.mark.parametrize("then", [None, "none", "safe-reclam"])
def test_nothing_is_launched_with_another_environment(process: Process, then: str | None) -> None:
    """With data parallelism no child tells the main process what it has in force."""
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    plugin.activate()
    if then is None:
        process.env.delenv(PLUGIN_ENV)
    else:
        process.env.setenv(PLUGIN_ENV, then)
    assert PLUGIN_ENV in line(process.launch)
    assert process.started == []


def test_an_untouched_process_stays_untouched(process: Process) -> None:
    plugin.activate()
    process.flags()
    process.flags("--plugin", "none")
    assert process.armed == [] and plugin.statuses() == []
    assert LAUNCH not in process.hooks and SCHEDULER not in process.hooks
    assert process.started == ["arguments", "arguments"]


def test_a_child_hooks_its_scheduler_and_no_launch(process: Process) -> None:
    process.env.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=1))
    process.env.setenv(ACTION.env, "abort")
    plugin.activate()
    process.scheduler()
    assert LAUNCH not in process.hooks
    assert process.armed[0].guard == "abort"


def called_by(target: str, call: Callable[[], None]) -> None:
    """Run `call` below a function that is called like stock's."""
    module, _, name = target.partition(":")
    scope: dict[str, Any] = {"__name__": module}
    exec(f"def {name}(call): call()", scope)
    scope[name](call)


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Imports a module, as far as the plugin sees it."""
    waiting: dict[str, list[Callable[[object], None]]] = {}
    monkeypatch.setattr(
        import_hooks, "after_import", lambda name, hook: waiting.setdefault(name, []).append(hook)
    )

    def imported(target: str) -> None:
        for hook in waiting.pop(target.partition(":")[0], []):
            hook(object())

    return imported


@pytest.mark.parametrize("point", points.WITHOUT_KV, ids=lambda point: point.target)
def test_a_process_without_kv_is_armed_only_if_a_scheduler_is_built_there_after_all(
    process: Process, imports: Callable[[str], None], point: AttachPoint
) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    called_by(point.target, plugin.activate)
    called_by(point.target, plugin.activate)
    assert process.armed == [] and plugin.statuses() == []
    imports(SCHEDULER)
    assert process.armed == []  # a controller imports it and builds none
    process.scheduler()
    assert len(process.armed) == 1 and process.started == ["scheduler"]
    process.scheduler()
    assert len(process.armed) == 1


def test_a_process_without_kv_that_launches_a_server_is_armed_before(
    process: Process, imports: Callable[[str], None]
) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    called_by(points.DETOKENIZER.target, plugin.activate)
    imports(LAUNCH)
    process.env.setenv(PLUGIN_ENV, "none")
    assert f"armed for {DEFAULT}" in line(process.launch)  # what it was asked for first counts
    assert process.started == []


def test_a_refusal_in_a_process_without_kv_comes_before_its_scheduler(
    process: Process, imports: Callable[[str], None]
) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    process.broken = {"safe-reclaim"}
    called_by(points.CONTROLLER.target, plugin.activate)
    imports(SCHEDULER)
    first = line(process.scheduler)
    assert "safe-reclaim: because" in first
    assert line(process.scheduler) == first
    assert process.started == []


@pytest.mark.parametrize(
    "caller",
    [
        "sglang.srt.managers.scheduler:run_scheduler_process",
        "sglang.srt.managers.detokenizer_manager:run_detokenizer_process_of_mine",
        "mine:run_detokenizer_process",
        "sglang.srt.managers.detokenizer_manager:something_new",
    ],
)
def test_any_other_process_is_armed_at_once(process: Process, caller: str) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    called_by(caller, plugin.activate)
    assert len(process.armed) == 1
    assert [s["name"] for s in plugin.statuses()] == ["safe-reclaim"]


def refusing(words: str, only_by_name: bool = False) -> Callable[..., None]:
    def check(fix: Fix, _server_args: Any, config: Config) -> None:
        if not only_by_name or fix.name in config.named:
            raise ConfigError(words)

    return check


@pytest.mark.parametrize(
    ("refused", "offer"),
    [
        (("safe-reclaim",), "early-send-ordering,spec-guard,resume"),
        (("spec-guard",), "safe-reclaim,early-send-ordering,resume"),
        (("safe-reclaim", "spec-guard"), "early-send-ordering,resume"),
        (("safe-reclaim", "spec-guard", "early-send-ordering", "resume"), "none"),
    ],
)
@pytest.mark.parametrize("said", ["change it, or start with --plugin none", "change it"])
def test_a_refused_server_is_told_which_fixes_would_start(
    process: Process, refused: tuple[str, ...], offer: str, said: str
) -> None:
    process.env.setattr(plugin, "_check_server_args", CHECK_SERVER_ARGS)
    for fix in fixes.FIXES:
        only_by_name = fix.name != refused[0]  # as the guard does without drafts
        if fix.name in refused:
            process.env.setattr(type(fix), "check", refusing(said, only_by_name))
        else:
            process.env.setattr(type(fix), "check", lambda *_: None)
    plugin.activate()
    text = line(process.flags, "--plugin")
    assert text.startswith(f"sglang-scaling-fixes: {refused[0]}: change it")
    assert text.endswith(f"or start with --plugin {offer}") and text.count("--plugin") == 1


def test_what_a_setting_would_arm_all_the_same_is_not_offered_to_be_left_out(
    process: Process,
) -> None:
    process.env.setattr(plugin, "_check_server_args", CHECK_SERVER_ARGS)
    for fix in fixes.FIXES:
        process.env.setattr(type(fix), "check", lambda *_: None)
    process.env.setattr(type(specguard.FIX), "check", refusing("use --spec-guard observe"))
    plugin.activate()
    text = line(process.flags, "--plugin", "--spec-guard", "abort")
    assert text == "sglang-scaling-fixes: spec-guard: use --spec-guard observe"


def test_a_refused_arming_is_told_which_fixes_hold(process: Process) -> None:
    process.broken = {"safe-reclaim"}
    process.env.setenv(PLUGIN_ENV, "default")
    text = line(plugin.activate)
    assert text.endswith("because; or start with --plugin early-send-ordering,spec-guard,resume")
    process.env.setattr(plugin, "_process", plugin._Process())
    process.hooks.clear()
    process.broken = set(fixes.FIX_NAMES)
    assert line(plugin.activate).endswith("because; or start with --plugin none")


def moved(*_: Any) -> None:
    raise ConfigError("it moved")


def out_of_order(*_: Any) -> None:
    ordering.check(SimpleNamespace(enable_pdmux=True, enable_hierarchical_cache=True))


@pytest.mark.parametrize(
    ("stock", "said"), [(out_of_order, "hicache-ordering: --enable-pdmux"), (moved, "it moved")]
)
def test_an_error_while_stock_builds_its_scheduler_names_the_fix_that_raised_it_or_none(
    process: Process, stock: Callable[..., Any], said: str
) -> None:
    process.env.setenv(PLUGIN_ENV, DEFAULT)
    plugin.activate()
    args = SimpleNamespace(enable_metrics=False)
    text = line(lambda: process.hooks[SCHEDULER](stock, object(), args))
    assert text.startswith(f"sglang-scaling-fixes: {said}")
