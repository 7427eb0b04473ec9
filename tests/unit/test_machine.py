"""What a machine has decides how Mooncake writes: every such branch, on machines made up here."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sglang_scaling_fixes
from sglang_scaling_fixes import machine, release
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.machine import Machine, MachineError
from sglang_scaling_fixes.reclaim import server_args
from sglang_scaling_fixes.reclaim.decode import fence
from tests.machines import MACHINES, Made
from tests.unit.reclaim.test_server_args import args

CUDA, CUDA13, CPU, NPU = release.MOONCAKE_DISTRIBUTIONS
NEW, OLD = "0.3.13.post1", "0.3.11"


@dataclass
class Claim:
    """Puts a machine in place of this one."""

    monkeypatch: pytest.MonkeyPatch
    folder: Path

    def __call__(
        self, made: Made, env: dict[str, str] | None = None, **wheels: str
    ) -> machine.Rdma:
        root = made.under(self.folder / f"root {len(list(self.folder.iterdir()))}")
        self.monkeypatch.setattr(machine, "here", Machine(root, env or {}, wheels.get))
        return machine.here.rdma()


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Claim:
    return Claim(monkeypatch, tmp_path)


def mooncake(claim: Claim, made: Made, wheel: str, version: str, **env: str) -> release.Mooncake:
    claim(made, env, **{wheel: version})
    found = release.mooncake()
    assert found is not None
    return found


# -- what there is ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_devices_and_doubts(claim: Claim, name: str) -> None:
    made = MACHINES[name]
    found = claim(made)
    assert found.devices == made.devices
    assert made.doubt in found.doubt and bool(made.doubt) == bool(found.doubt)
    assert found.possible == bool(made.devices or made.doubt)


@pytest.mark.parametrize("unreadable", ["sys/class", "sys/class/infiniband", "dev/infiniband"])
def test_what_may_not_be_read_is_a_doubt(
    claim: Claim, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    """Root may read everything, so the refusal is put in."""
    claim(MACHINES["one HCA"])
    forbidden = machine.here.root / unreadable
    listed = os.listdir

    def refuse(path: Path) -> list[str]:
        if path == forbidden:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    found = machine.here.rdma()
    assert "Permission denied" in found.doubt
    assert found.devices == (("mlx5_0",) if unreadable.startswith("dev") else ())


def test_without_proc_it_says_so(claim: Claim) -> None:
    claim(MACHINES["no devices"])
    with pytest.raises(MachineError, match=r"/proc/self/fd.*mount /proc.*--plugin none"):
        fence.openings()


def test_this_process_shows_its_files_and_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = f"port {door.getsockname()[1]}"
        assert port in fence.openings()
    assert port not in fence.openings()


# -- what follows from it --------------------------------------------------------------

ENVIRONMENTS: tuple[dict[str, str], ...] = (
    {},
    {"MC_FORCE_TCP": "1"},
    {"MOONCAKE_PROTOCOL": "rdma"},
    {"MOONCAKE_PROTOCOL": "tcp"},
    {"MC_TCP_PROTO": "1"},
    {"MC_FORCE_TCP": "1", "MC_TCP_PROTO": "1"},
)


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=lambda env: ",".join(env) or "nothing set")
@pytest.mark.parametrize("name", MACHINES)
def test_how_it_writes_and_whether_that_is_proven(
    claim: Claim, name: str, env: dict[str, str]
) -> None:
    """Never in force unless it is known how Mooncake writes, and that its success means landed."""
    made = MACHINES[name]
    for wheel, version in itertools.product((CUDA, CUDA13, CPU), (NEW, OLD)):
        found = mooncake(claim, made, wheel, version, **env)
        forced = "MC_FORCE_TCP" in env
        over_rdma = bool(made.devices) and not forced
        acknowledged = version == NEW and "MC_TCP_PROTO" not in env
        assert found.protocol == ("rdma" if over_rdma else "tcp-v2" if acknowledged else "tcp-v1")
        # Submitted once wherever there may be a device.
        assert release.mooncake_retries() == bool(made.devices or made.doubt)
        # A CUDA build that sees no device for certain must be told to use TCP.
        problem = release.mooncake_problem(found)
        if wheel != CPU and not made.devices and not forced:
            assert problem is not None and "MC_FORCE_TCP=1" in problem
            assert made.doubt in problem
        elif not over_rdma and not acknowledged:
            assert problem is not None and "TCP protocol v1" in problem
        else:
            assert problem is None
        # And whoever is to write over RDMA must have opened a device (asked after the start).
        assert release.needs_rdma(found) == (not forced and (wheel != CPU or over_rdma))


@pytest.mark.parametrize("variable", ["MC_CUSTOM_TOPO_JSON", "MC_FORCE_HCA"])
def test_devices_that_are_named_may_be_there(claim: Claim, variable: str) -> None:
    """They decide how often Mooncake submits, and prove nothing to a CUDA build."""
    found = mooncake(claim, MACHINES["no devices"], CUDA, NEW, **{variable: "x"})
    assert release.mooncake_retries()
    assert "MC_FORCE_TCP=1" in found.unproven


def test_an_empty_switch_is_not_forced_tcp(claim: Claim) -> None:
    found = mooncake(claim, MACHINES["one HCA"], CPU, NEW, MC_FORCE_TCP="")
    assert release.needs_rdma(found)


def test_ascend_whatever_there_is(claim: Claim) -> None:
    for made in MACHINES.values():
        assert "Ascend" in mooncake(claim, made, NPU, NEW).unproven
        assert mooncake(claim, made, NPU, NEW, MC_FORCE_TCP="1").unproven == ""


def test_wheels_over_each_other_are_refused(claim: Claim) -> None:
    """The files in use are the last one's, and pip does not say which that was."""
    claim(MACHINES["one HCA"], {"MC_FORCE_TCP": "1"}, **{CUDA: NEW, CPU: OLD})
    problem = release.mooncake_problem(release.mooncake())
    assert problem is not None
    for word in (f"{CUDA} {NEW}", f"{CPU} {OLD}", "uninstall"):
        assert word in problem


def test_no_wheel(claim: Claim) -> None:
    claim(MACHINES["one HCA"])
    assert release.mooncake() is None
    assert release.sglang_version() is None


# -- after the start: what the engine opened ----------------------------------------------

HANDLE = "99: /dev/infiniband/uverbs0"


class Busy(Machine):
    """This machine, where somebody else (NCCL) has an RDMA device open in this process."""

    def open_files(self) -> list[tuple[str, str]]:
        number, _, target = HANDLE.partition(": ")
        return [*super().open_files(), (number, target)]


class Raw:
    """Mooncake's engine: a port of its own."""

    def __init__(self) -> None:
        self.door = socket.create_server(("127.0.0.1", 0))

    def __del__(self) -> None:
        self.door.close()

    def batch_transfer_async_write(self) -> None: ...
    def get_batch_transfer_status(self) -> None: ...


class Engine:
    """Stock's wrapper of it, as far as the fence and the check look at it."""

    def __init__(self, hostname: str = "", gpu_id: int = 0, ib_device: str = "") -> None:
        self.hostname, self.gpu_id, self.ib_device = hostname, gpu_id, ib_device
        before = fence.openings()
        self.engine = Raw()
        self.session_id = f"127.0.0.1:{self.engine.door.getsockname()[1]}"
        fence.record(self, fence.openings() - before)

    def batch_register(self, ptrs: list[int], lengths: list[int]) -> int:
        return len(ptrs) - len(lengths)


class Manager:
    def __init__(self) -> None:
        self.engine = Engine()

    def register_buffer_to_engine(self) -> None:
        self.engine.batch_register([1], [1])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    monkeypatch.setattr(server_args, "_is_mooncake", lambda manager: True)
    manager = Manager()
    yield manager
    del manager.engine.engine


@pytest.mark.parametrize("wheel", [CUDA, CPU])
def test_an_rdma_device_of_somebody_else_is_not_mooncakes(
    claim: Claim, started: Manager, wheel: str
) -> None:
    claim(MACHINES["several HCAs"], {}, **{wheel: NEW})
    machine.here = Busy(machine.here.root, {release.POSTS: "1"}, machine.here.version)
    (machine.here.root / "proc/self/fd").mkdir(parents=True)
    assert HANDLE in fence.openings()
    with pytest.raises(ConfigError, match=rf"no RDMA device.*{wheel} may.*MC_FORCE_TCP=1"):
        server_args._check_transport(started)
    fence.record(started.engine, {"port 1", HANDLE})
    server_args._check_transport(started)


@pytest.mark.parametrize("said", [None, "", "0", "1", "2", "9", "one"])
@pytest.mark.parametrize("name", ["no devices", "one HCA", "several HCAs", "no /sys"])
def test_a_write_that_rdma_would_post_again_is_refused(
    claim: Claim, started: Manager, name: str, said: str | None
) -> None:
    """Before the start what an operator set, after it whatever is in force."""
    env = {} if said is None else {release.POSTS: said}
    claim(MACHINES[name], env, **{CPU: NEW})
    fence.record(started.engine, {"port 1", HANDLE})
    wrong = name != "no devices" and said != "1"
    refused = pytest.raises(ConfigError, match=rf"MC_RETRY_CNT.*{said or ''}.*set MC_RETRY_CNT=1")
    with refused if wrong else contextlib.nullcontext():
        server_args._check_transport(started)
    with refused if wrong and said is not None else contextlib.nullcontext():
        server_args.check(args())
    claim(MACHINES[name], {**env, "MC_FORCE_TCP": "1"}, **{CPU: NEW})
    server_args._check_transport(started)
    server_args.check(args())


def test_forced_tcp_needs_no_device(claim: Claim, started: Manager) -> None:
    claim(MACHINES["several HCAs"], {"MC_FORCE_TCP": "1"}, **{CUDA: NEW})
    server_args._check_transport(started)


@pytest.mark.parametrize("name", ["no devices", "one HCA", "no /sys"])
def test_a_mooncake_that_cannot_submit_once_is_refused_where_it_would_have_to(
    claim: Claim, started: Manager, name: str
) -> None:
    claim(MACHINES[name], {"MC_FORCE_TCP": "1"}, **{CPU: NEW})
    server_args._check_transport(started)
    raw: Any = started.engine
    raw.engine = SimpleNamespace(batch_transfer_async_write=None)
    if name == "no devices":
        server_args._check_transport(started)
    else:
        with pytest.raises(ConfigError, match=r"0\.3\.13.*no get_batch_transfer_status.*0\.3\.5"):
            server_args._check_transport(started)


def test_a_fence_over_tcp_does_not_wait_for_somebody_elses_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's handles stay, and are none of the engine's."""
    monkeypatch.setattr(machine, "here", Busy())
    manager = Manager()
    before = manager.engine.session_id
    old = fence.switch(manager)
    assert before == old.session != manager.engine.session_id
    fence.retire(old, lambda ports: ports)
    fence.record(manager.engine, fence.engine_has(manager.engine) | {HANDLE})
    old = fence.switch(manager)
    with pytest.raises(fence.FenceError, match=r"not closed whole: .*uverbs0"):
        fence.retire(old, lambda ports: ports)


def test_an_engine_that_nobody_saw_opened_is_no_fence(started: Manager) -> None:
    raw, session = started.engine.engine, started.engine.session_id
    fence.record(started.engine, set())
    with pytest.raises(fence.FenceError, match="nobody saw what the engine"):
        fence.switch(started)
    assert (started.engine.engine, started.engine.session_id) == (raw, session)


def test_a_second_engine_that_takes_no_memory_leaves_the_first_as_it_was(
    started: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, session = started.engine.engine, started.engine.session_id
    opened = fence.engine_has(started.engine)
    monkeypatch.setattr(Engine, "batch_register", lambda *_: -1)
    with pytest.raises(fence.FenceError, match="registered anew"):
        fence.switch(started)
    assert (started.engine.engine, started.engine.session_id) == (raw, session)
    assert fence.engine_has(started.engine) == opened
    assert opened <= fence.openings()


def test_an_engine_that_somebody_else_holds_is_not_closed(started: Manager) -> None:
    old = fence.switch(started)
    held = old.raw
    unions: list[set[int]] = []

    def of_all_ranks(ports: set[int]) -> set[int]:
        unions.append(ports)
        return ports

    with pytest.raises(fence.FenceError, match="held by another part"):
        fence.retire(old, of_all_ranks)
    assert held is old.raw and len(unions) == 1, "every rank takes part, or the others hang"


# -- nobody else looks ----------------------------------------------------------------------

ALLOWED = {
    "machine.py": "the place",
    "flags.py": "reads and writes this package's own settings",
    "entry.py": "reads this package's own settings with nothing but the standard library",
    "doctor.py": "hands the whole environment on to its child",
    "patches/export.py": "hands the whole environment on to git",
    "loading_probe.py": "runs by its path, where this package may be what cannot be imported",
    "reclaim/__init__.py": "sets a variable that Mooncake reads",
}
LOOKS = ("/sys", "/proc", "/dev/")


def looks(source: str) -> set[str]:
    """What a module looks at by itself: environment, distributions, the system's files."""
    found = set()
    tree = ast.parse(source)
    documented = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and "importlib" in (node.module or ""):
            found |= {name.name for name in node.names if name.name == "metadata"}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {n.name for n in node.names if n.name in ("environ", "getenv")}
            found |= {n.name for n in node.names if n.name == "importlib.metadata"}
        elif (
            isinstance(node, ast.Constant)
            and node not in documented
            and isinstance(node.value, str)
            and node.value.startswith(LOOKS)
        ):
            found.add(node.value)
    return found


def test_only_one_module_looks_at_the_machine() -> None:
    """Not the lab's: it makes machines."""
    package = Path(sglang_scaling_fixes.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if looks(path.read_text()) and "lab" not in path.relative_to(package).parts
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.environ['MC_FORCE_TCP']",
        "import os; os.getenv('MC_FORCE_TCP')",
        "from os import environ",
        "from importlib import metadata",
        "from importlib.metadata import metadata",
        "import importlib.metadata",
        "from pathlib import Path; Path('/sys/class/infiniband').is_dir()",
        "import os; os.listdir('/proc/self/fd')",
    ],
)
def test_a_look_is_noticed(line: str) -> None:
    assert looks(line)
    assert not looks('"""Of /sys."""\nx = 1')
