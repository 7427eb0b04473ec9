"""One stock SGLang server on this CPU."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from sglang_scaling_fixes import flags
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.runtime import cpu_env
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.client import Answer, Call, call
from sglang_scaling_fixes.lab.servers.link import Place
from sglang_scaling_fixes.lab.servers.process import Supervised
from sglang_scaling_fixes.lab.standins import gpu
from sglang_scaling_fixes.lab.verbs import NIC, Transport
from sglang_scaling_fixes.lab.verbs.build import over_rdma

Role = Literal["prefill", "decode", "alone"]

READY_S = 300.0
ANSWER_S = 180.0

COMMON_FLAGS = (
    "--device", "cpu",
    "--dtype", "float32",
    "--skip-server-warmup",
    "--disable-overlap-schedule",
    "--random-seed", "1",
)  # fmt: skip


class Server:
    """One SGLang server under a supervisor."""

    def __init__(
        self,
        environment: Environment,
        model: Model,
        name: str,
        role: Role,
        *,
        place: Place,
        client: Place,
        run_dir: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        transport: Transport = "tcp",
    ) -> None:
        self.name = name
        self.role = role
        self.place = place
        self.client = client
        self.port, self.bootstrap_port = place.free_ports(2)
        self._environment = environment
        self._model = model
        self._env = dict(env or {})
        self._transport = transport
        self._log = run_dir / f"{name}.log"
        self._command = [
            str(environment.python), "-m", "sglang.launch_server",
            "--model-path", str(model.folder), "--host", place.address, "--port", str(self.port),
            *COMMON_FLAGS, *_tokenizer_flags(model), *model.flags, *self._role_flags(), *flags,
        ]  # fmt: skip
        self._start()

    @property
    def url(self) -> str:
        return f"http://{self.place.address}:{self.port}"

    def _role_flags(self) -> list[str]:
        if self.role == "alone":
            return []
        return [
            "--disaggregation-mode", self.role,
            "--disaggregation-bootstrap-port", str(self.bootstrap_port),
            "--disaggregation-transfer-backend", "mooncake",
            *_release_flags(self._environment, self.role),
        ]  # fmt: skip

    def _start(self) -> None:
        refuse_unprotected({**os.environ, **self._env})
        self._started = time.monotonic()
        scratch = tempfile.mkdtemp(prefix="ssf-lab-")
        options = ["--scratch", scratch]
        if self.place.netns is not None:
            options += ["--netns", self.place.netns]
        command = self._command
        env = _server_env(self._environment, self._model, self.place, scratch, self._env)
        if self._transport == "rdma":
            command, env = over_rdma(command, env, {"rdma0": self.place.address})
        self.process = Supervised(command, log=self._log, env=env, supervisor_options=options)

    def restart(self) -> None:
        """Start anew at the same address and ports, as an operator's supervisor would."""
        self.process.end()
        self._start()

    def end(self) -> None:
        """Kill the server with all its processes and wait until they are gone."""
        self.process.end()

    def signal(self, number: signal.Signals, *, nics: bool = False) -> None:
        """Send a signal to each of the server's processes.

        Its RDMA devices are not among them: they go on while it is stopped, and end after it.
        With `nics` they get the signal, too.
        """
        for pid in self.process.pids():
            with suppress(ProcessLookupError, FileNotFoundError):
                if nics or Path(f"/proc/{pid}/comm").read_text().strip() != NIC:
                    os.kill(pid, number)

    def wait_ready(self, timeout_s: float = READY_S) -> float:
        """Seconds from start until the server answered; LabError if it ends or never does."""
        while True:
            waited = time.monotonic() - self._started
            if not self.process.alive:
                raise LabError(self._obituary(f"ended with status {self.process.status}"))
            if self.get("/health", timeout_s=5.0).status == 200:
                return waited
            if waited > timeout_s:
                raise LabError(self._obituary(f"was not ready after {timeout_s:.0f} s"))
            time.sleep(0.3)

    def get(self, path: str, timeout_s: float = 10.0) -> Answer:
        return call(self.client, self.place.address, self.port, path, timeout_s=timeout_s)

    def post(self, path: str, payload: object, timeout_s: float = ANSWER_S) -> Answer:
        return call(
            self.client, self.place.address, self.port, path, payload=payload, timeout_s=timeout_s
        )

    def calling(self, path: str, payload: object) -> Call:
        return Call(self.client, self.place.address, self.port, path, payload=payload)

    def _obituary(self, what: str) -> str:
        return f"lab server {self.name} {what}; log {self.process.log}, its end:\n" + (
            self.process.tail()
        )


def refuse_unprotected(env: Mapping[str, str]) -> None:
    """LabError where the environment asks for fixes and keeps the server from loading them.

    Such a server would start as stock does. Asked by flag it refuses by itself: `--plugin` is
    unknown to it.
    """
    if flags.from_env(env).armed and (problem := flags.left_out(env)) is not None:
        raise LabError(f"the server would start without the fixes it is asked for: {problem}")


def _tokenizer_flags(model: Model) -> list[str]:
    if model.tokenizer is None:
        return ["--skip-tokenizer-init"]
    return ["--tokenizer-path", str(model.tokenizer)]


def refuse_a_gpu() -> None:
    """LabError beside a GPU, before anything is started there."""
    found = gpu.present()
    if found is not None:
        raise LabError(f"the lab fakes a CPU-only SGLang and never runs beside a GPU ({found})")


def _release_flags(environment: Environment, role: Role) -> list[str]:
    """Flags that only some releases know."""
    if role == "decode" and environment.knows_flag("disaggregation_decode_retraction_backup"):
        return ["--disaggregation-decode-retraction-backup", "none"]
    return []


def _server_env(
    environment: Environment, model: Model, place: Place, scratch: str, extra: Mapping[str, str]
) -> dict[str, str]:
    return cpu_env(
        {
            **environment.env,
            "TMPDIR": scratch,
            "SGLANG_HOST_IP": place.address,
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
            "SGLANG_DISABLED_MODEL_ARCHS": ",".join(environment.models_other_than(model.modules)),
            **model.env,
            **extra,
        }
    )
