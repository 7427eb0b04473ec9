"""Servers of the tiny GLM-5.1 on this CPU, alone or as a prefill/decode pair.

>>> with serving(Options(pd=True, spec=True), environment, run_dir) as served:
...     answer = served.ask(prompt(200), max_new_tokens=24)
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_scaling_fixes.console import Progress
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.glm import weights
from sglang_scaling_fixes.lab.install import Environment, install
from sglang_scaling_fixes.lab.servers import checkpoints
from sglang_scaling_fixes.lab.servers.client import Answer
from sglang_scaling_fixes.lab.servers.cluster import Cluster, ClusterSpec
from sglang_scaling_fixes.lab.servers.link import LOCAL, link
from sglang_scaling_fixes.lab.servers.pending import greedy
from sglang_scaling_fixes.lab.servers.server import Server, refuse_a_gpu

RELEASE = "0.5.23"

# The defaults SGLang itself chooses for GLM-5.1: a chain of three drafted tokens.
SPEC_FLAGS: tuple[str, ...] = (
    "--speculative-algorithm", "EAGLE",
    "--speculative-num-steps", "3",
    "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "4",
)  # fmt: skip
# Copies of lists of rows, which a stand-in can make; the other backends take raw pointers.
HICACHE_FLAGS: tuple[str, ...] = (
    "--enable-hierarchical-cache",
    "--hicache-size", "1",
    "--hicache-io-backend", "direct",
    "--hicache-mem-layout", "layer_first",
)  # fmt: skip
TOKENS = 4096


@dataclass(frozen=True)
class Options:
    """What `lab serve` starts."""

    pd: bool = False
    hicache: bool = False
    spec: bool = False
    cp: int = 1  # ranks of prefill context parallelism
    layer_split: bool = False  # each of them keeps only its layers' KV
    layers: int = weights.LAYERS  # of the model, beside its MTP layer
    packed: bool = False  # KV in packed fp8, as production keeps it; else bf16
    text: bool = False  # with a tokenizer of words, for the OpenAI API
    tokens: int = TOKENS  # KV slots of each server
    flags: tuple[str, ...] = ()  # for every server
    prefill_flags: tuple[str, ...] = ()  # for who prefills
    decode_flags: tuple[str, ...] = ()  # for a pair's decode
    env: Mapping[str, str] = field(default_factory=dict)
    sleep_on_idle: bool = False  # as in ClusterSpec

    def cluster_spec(self) -> ClusterSpec:
        """What the servers are given: both of a pair, or with `pd` off the one that does it all."""
        return ClusterSpec(
            prefills=1,
            flags=self.shared(),
            prefill_flags=self.prefill(),
            decode_flags=self.decode_flags,
            env=self.env,
            tokens=self.tokens,
            sleep_on_idle=self.sleep_on_idle,
        )

    def shared(self) -> tuple[str, ...]:
        packed = ("--kv-cache-dtype", "fp8_e4m3") if self.packed else ()
        return (*(SPEC_FLAGS if self.spec else ()), *packed, *self.flags)

    def prefill(self) -> tuple[str, ...]:
        """For who prefills: a decode server of a pair keeps no prefixes and splits none."""
        flags: tuple[str, ...] = HICACHE_FLAGS if self.hicache else ()
        if self.cp > 1:
            flags += ("--tp", str(self.cp), "--enable-prefill-cp", "--cp-strategy", "interleave")
        if self.layer_split:
            flags += ("--enable-dsa-cache-layer-split",)
        return (*flags, *self.prefill_flags)

    def check(self) -> None:
        """LabError for what stock cannot do."""
        if self.layer_split and not (self.pd and self.cp > 1):
            raise LabError(
                "--layer-split splits the layers of a prefill server over its ranks:"
                " add --pd and --cp 2"
            )
        if self.layer_split and self.cp > self.layers:
            raise LabError(
                f"--layer-split --cp {self.cp}: the model has {self.layers} layers, so that a"
                f" rank would have none; add --layers {self.cp} or more"
            )


@dataclass(frozen=True)
class Reply:
    """What a request came back with."""

    ids: list[int]
    meta: dict[str, Any]  # SGLang's meta_info
    prefill: dict[str, Any]  # that of the server which did the prefill


@dataclass(frozen=True)
class Served:
    """Running servers."""

    name: str
    servers: tuple[Server, ...]
    cluster: Cluster | None

    def ask(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        options: Mapping[str, object] | None = None,
    ) -> Reply:
        """One greedy request; LabError if it is not answered."""
        if self.cluster is None:
            payload = {**greedy(prompt, max_new_tokens), **(options or {})}
            answers = [self.servers[0].post("/generate", payload)]
        else:
            rid = str((options or {}).get("rid", f"ask-{self.cluster.requests}"))
            outcome = self.cluster.send(
                self.cluster.fast, prompt, rid, max_new_tokens=max_new_tokens, options=options
            ).wait()
            answers = [outcome.decode, outcome.prefill or Answer(0, "prefill did not answer")]
        for answer in answers:
            if answer.status != 200 or not isinstance(answer.body, dict):
                raise LabError(f"a lab server answered {answer.status}: {answer.body}")
        return Reply(
            answers[0].body["output_ids"],
            answers[0].body["meta_info"],
            answers[-1].body["meta_info"],
        )

    def wait(self) -> None:
        """Until one of the servers ends; LabError then."""
        while all(server.process.alive for server in self.servers):
            time.sleep(0.5)
        for server in self.servers:
            if not server.process.alive:
                raise LabError(f"lab server {server.name} ended:\n{server.process.tail()}")


@contextlib.contextmanager
def serving(options: Options, environment: Environment, run_dir: Path) -> Iterator[Served]:
    """The servers of `options`, ready; they end with the block."""
    options.check()
    refuse_a_gpu()
    model = checkpoints.tiny_glm(environment, text=options.text, layers=options.layers)
    spec = options.cluster_spec()
    if options.pd:
        with (
            link(0, run_dir, shaped=False) as way,
            Cluster(environment, model, way, run_dir, spec) as cluster,
        ):
            yield Served(model.name, (cluster.decode, cluster.fast), cluster)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    server = Server(
        environment,
        model,
        "server",
        "alone",
        place=LOCAL,
        client=LOCAL,
        run_dir=run_dir,
        flags=[*spec.common_flags(), *spec.prefill_flags, *spec.flags],
        env=spec.env,
    )
    try:
        server.wait_ready()
        yield Served(model.name, (server,), None)
    finally:
        server.end()


def prompt(length: int, seed: int = 1) -> list[int]:
    """Random tokens whose last third repeats the first: the model goes on copying."""
    draw = random.Random(seed)
    part = [draw.randrange(3, weights.VOCAB) for _ in range(length - length // 3)]
    return part + part[: length // 3]


def run(options: Options, progress: Progress, once: bool) -> dict[str, Any] | None:
    """`lab serve`: start, say where, and stay; or ask `prompt(240)` once and end."""
    options.check()
    environment = install(RELEASE, progress)
    with tempfile.TemporaryDirectory(prefix="ssf-serve-") as folder:
        began = time.monotonic()
        with serving(options, environment, Path(folder)) as served:
            progress(f"{served.name} is ready after {time.monotonic() - began:.0f} s")
            if once:
                reply = served.ask(prompt(240), 24)
                return {"output_ids": reply.ids, "meta_info": reply.meta}
            for line in invitation(served):
                progress(line)
            served.wait()
    return None


def invitation(served: Served) -> list[str]:
    """Where the servers are, and a request for the reader's shell."""
    lines = [f"{server.name}: {server.url}, log {server.process.log}" for server in served.servers]
    sampling = '"sampling_params": {"max_new_tokens": 24, "temperature": 0}'
    body = f'{{"input_ids": [5, 6, 7, 8, 5, 6], {sampling}'
    post = "curl -s -H 'Content-Type: application/json'"
    if served.cluster is None:
        return [*lines, f"try: {post} {served.servers[0].url}/generate -d '{body}}}'"]
    prefill = served.cluster.fast
    body += (
        f', "bootstrap_host": "{prefill.place.address}",'
        f' "bootstrap_port": {prefill.bootstrap_port}, "bootstrap_room": 1}}'
    )
    both = " & ".join(f"{post} {server.url}/generate -d '{body}'" for server in served.servers)
    return [*lines, f"try (the same request to both, a new room each time): {both}"]
