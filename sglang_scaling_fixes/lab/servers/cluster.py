"""Stock SGLang servers on this CPU: prefill servers and one decode server.

>>> spec = ClusterSpec(flags=("--plugin",))
>>> with link(48, run_dir) as way, Cluster(environment, model, way, run_dir, spec) as cluster:
...     answer = cluster.send(cluster.fast, prompt, "r1", max_new_tokens=60).wait()
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from sglang_scaling_fixes.config import Config, left_out
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.observing.reader import Observations
from sglang_scaling_fixes.lab.runtime import OBSERVE, cpu_env
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.client import Answer, Call, call
from sglang_scaling_fixes.lab.servers.link import Link, Place
from sglang_scaling_fixes.lab.servers.process import Supervised
from sglang_scaling_fixes.lab.standins import gpu

Role = Literal["prefill", "decode", "alone"]

READY_S = 300.0
ANSWER_S = 180.0
POOL_TOKENS = 1500
"""KV slots of a server, unless a cluster is told otherwise."""
_OBSERVED = "observations.jsonl"

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
    ) -> None:
        self.name = name
        self.role = role
        self.place = place
        self.client = client
        self.port, self.bootstrap_port = place.free_ports(2)
        self._environment = environment
        self._model = model
        self._env = dict(env or {})
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
        self.process = Supervised(
            self._command,
            log=self._log,
            env=_server_env(self._environment, self._model, self.place, scratch, self._env),
            supervisor_options=options,
        )

    def restart(self) -> None:
        """Start anew at the same address and ports, as an operator's supervisor would."""
        self.process.end()
        self._start()

    def end(self) -> None:
        """Kill the server with all its processes and wait until they are gone."""
        self.process.end()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to each of the server's processes."""
        for pid in self.process.pids():
            with suppress(ProcessLookupError):
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
    if Config.from_env(env).armed and (problem := left_out(env)) is not None:
        raise LabError(f"the server would start without the fixes it is asked for: {problem}")


def _tokenizer_flags(model: Model) -> list[str]:
    if model.tokenizer is None:
        return ["--skip-tokenizer-init"]
    return ["--tokenizer-path", str(model.tokenizer)]


@dataclass(frozen=True)
class Outcome:
    """How a request ended on the decode side."""

    rid: str
    ids: list[int] | None  # generated token ids; None if there was no such answer
    aborted: bool
    decode: Answer
    prefill: Answer | None  # None if prefill had not answered by then

    @property
    def refusal(self) -> str | None:
        """The error decode answered in words; None for an answer, silence or garbage."""
        return None if self.ids is not None else refusal(self.decode)


def refusal(answer: Answer) -> str | None:
    """The words of an error answer: an HTTP error with a message, or a 200 that says abort."""
    if answer.status == 0 or not isinstance(answer.body, dict):
        return None
    if answer.status == 200:
        reason = (answer.body.get("meta_info") or {}).get("finish_reason") or {}
        words = reason.get("message") if reason.get("type") == "abort" else None
    else:
        error = answer.body.get("error") or answer.body.get("detail") or answer.body
        words = error.get("message") if isinstance(error, dict) else error
    return words if isinstance(words, str) and words.strip() else None


class Pending:
    """A request on its way to both servers."""

    def __init__(
        self,
        prefill: Server,
        decode: Server,
        rid: str,
        room: int,
        payload: Mapping[str, object],
    ) -> None:
        self.rid = rid
        self.room = room
        self._answers: dict[Role, Answer] = {}
        self._threads: dict[Role, threading.Thread] = {}
        self._calls = {
            server.role: server.calling("/generate", payload) for server in (prefill, decode)
        }
        for role, ringing in self._calls.items():
            thread = threading.Thread(target=self._send, args=(role, ringing), daemon=True)
            self._threads[role] = thread
            thread.start()

    def _send(self, role: Role, ringing: Call) -> None:
        self._answers[role] = ringing.run(ANSWER_S)

    def hang_up(self) -> None:
        """Close both connections, as a client that goes away."""
        for ringing in self._calls.values():
            ringing.hang_up()

    def done(self, role: Role) -> bool:
        return role in self._answers

    def wait(self, timeout_s: float = ANSWER_S + 10, prefill: bool = True) -> Outcome:
        """Wait for the decode server's answer, and for prefill's unless told not to."""
        self._threads["decode"].join(timeout_s)
        if prefill:
            self._threads["prefill"].join(timeout_s)
        answer = self._answers.get("decode", Answer(0, f"no answer within {timeout_s:g} s"))
        body = answer.body if isinstance(answer.body, dict) else {}
        meta = body.get("meta_info") or {}
        reason = (meta.get("finish_reason") or {}).get("type")
        ids = body.get("output_ids") if answer.status == 200 and reason != "abort" else None
        return Outcome(
            rid=self.rid,
            ids=ids,
            aborted=reason == "abort" or (answer.status >= 400 and "bort" in str(answer.body)),
            decode=answer,
            prefill=self._answers.get("prefill"),
        )


@dataclass(frozen=True)
class ClusterSpec:
    """What a cluster's servers are given beside what the lab and their role need.

    Of two flags that set the same, a server takes the last one: what is for every server
    comes after what is for one.
    """

    prefills: int = 2  # 1: only the one beside the decode server
    flags: tuple[str, ...] = ()  # for every server
    prefill_flags: tuple[str, ...] = ()  # for every prefill server
    decode_flags: tuple[str, ...] = ()
    slow_flags: tuple[str, ...] = ()  # for the prefill server across the link
    env: Mapping[str, str] = field(default_factory=dict)  # of every server; wins over the others
    decode_env: Mapping[str, str] = field(default_factory=dict)
    slow_env: Mapping[str, str] = field(default_factory=dict)
    tokens: int = POOL_TOKENS  # KV slots of each server
    sleep_on_idle: bool = False
    """Stock's own: a scheduler without a request waits for one, and looks up once a second."""

    def __post_init__(self) -> None:
        if self.prefills not in (1, 2):
            raise LabError(f"prefills={self.prefills}: a lab cluster has 1 or 2 prefill servers")

    def common_flags(self) -> list[str]:
        """For every server, before the flags of its role."""
        idle = ["--sleep-on-idle"] if self.sleep_on_idle else []
        return ["--max-total-tokens", str(self.tokens), *idle]


class Cluster:
    """One decode server and one or two prefill servers, started together.

    `fast` is beside the decode server; `slow` (with `prefills=2`) is across the link.
    With one prefill that one is `fast`.
    """

    decode: Server
    fast: Server
    slow: Server

    def __init__(
        self,
        environment: Environment,
        model: Model,
        way: Link,
        run_dir: Path,
        spec: ClusterSpec | None = None,
    ) -> None:
        self._environment = environment
        self._model = model
        self._link = way
        self._run_dir = run_dir
        self._spec = spec or ClusterSpec()
        self._stack = ExitStack()
        self._room = 1000 * (os.getpid() % 1000) + 1
        self.observations = Observations(run_dir / _OBSERVED)
        self.requests = 0
        self.ready_s = 0.0

    def __enter__(self) -> Cluster:
        refuse_a_gpu()
        began = time.monotonic()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        try:
            servers = self._start()
            for server in servers:
                server.wait_ready()
        except BaseException:
            self._stack.close()
            raise
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self) -> list[Server]:
        spec, near, far = self._spec, self._link.near, self._link.far
        observed = {OBSERVE: str(self._run_dir / _OBSERVED)}
        self.decode = self._server(
            "decode",
            "decode",
            near,
            ["--num-reserved-decode-tokens", "16", *spec.decode_flags],
            {**observed, **spec.decode_env},
        )
        self.fast = self._server("prefill-fast", "prefill", near, spec.prefill_flags, {})
        if spec.prefills == 1:
            return [self.decode, self.fast]
        slow = [*spec.prefill_flags, *spec.slow_flags]
        self.slow = self._server("prefill-slow", "prefill", far, slow, spec.slow_env)
        return [self.decode, self.fast, self.slow]

    def _server(
        self, name: str, role: Role, place: Place, flags: Sequence[str], env: Mapping[str, str]
    ) -> Server:
        server = Server(
            self._environment,
            self._model,
            name,
            role,
            place=place,
            client=self._link.near,
            run_dir=self._run_dir,
            flags=[*self._spec.common_flags(), *flags, *self._spec.flags],
            env={**env, **self._spec.env},
        )
        self._stack.callback(server.end)
        return server

    def send(
        self,
        prefill: Server,
        prompt: Sequence[int],
        rid: str,
        *,
        max_new_tokens: int,
        room: int | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Pending:
        """Send one greedy request to `prefill` and the decode server; returns at once.

        `room`: one to use again; a new one by default. `options` go into the JSON.
        """
        if room is None:
            self._room += 1
            room = self._room
        self.requests += 1
        payload = {
            **greedy(prompt, max_new_tokens),
            "rid": rid,
            "bootstrap_host": prefill.place.address,
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": room,
            **(options or {}),
        }
        return Pending(prefill, self.decode, rid, room, payload)

    def abort(self, rid: str) -> None:
        """Abort a request on the decode server, as a router or a client library does."""
        answer = self.decode.post("/abort_request", {"rid": rid}, timeout_s=30.0)
        if answer.status != 200:
            raise LabError(f"POST /abort_request answered {answer.status}: {answer.body}")


def greedy(prompt: Sequence[int], max_new_tokens: int) -> dict[str, object]:
    """The JSON of a request for exactly so many greedy tokens."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling}


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
