"""Stock SGLang servers on this CPU: prefill servers and one decode server.

>>> spec = ClusterSpec(flags=("--plugin",))
>>> with link(48, run_dir) as way, Cluster(environment, model, way, run_dir, spec) as cluster:
...     answer = cluster.send(cluster.fast, prompt, "r1", max_new_tokens=60).wait()
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment
from sglang_scaling_fixes.lab.observing.reader import Observations
from sglang_scaling_fixes.lab.runtime import OBSERVE
from sglang_scaling_fixes.lab.servers.checkpoints import Model
from sglang_scaling_fixes.lab.servers.link import Link, Place
from sglang_scaling_fixes.lab.servers.pending import Pending, greedy
from sglang_scaling_fixes.lab.servers.server import Role, Server, refuse_a_gpu
from sglang_scaling_fixes.lab.verbs import Transport

POOL_TOKENS = 1500
"""KV slots of a server, unless a cluster is told otherwise."""
_OBSERVED = "observations.jsonl"


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
    transport: Transport = "tcp"  # what prefill writes KV with
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
        self.release = environment.release
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
            transport=self._spec.transport,
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
