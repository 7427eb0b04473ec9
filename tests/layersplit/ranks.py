"""Ranks of a split pool in processes of their own, asked all at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from sglang_scaling_fixes.lab.runtime import DSA, cpu_env
from sglang_scaling_fixes.lab.servers.link import LOCAL

from . import rank

_INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Ranks:
    """`ask` runs a method of `rank.Rank` on every rank, and returns what each answered.

    `interpreted`: with stock's Triton kernels, in an interpreter; else with the lab's in PyTorch.
    """

    def __init__(self, count: int, *, interpreted: bool = False) -> None:
        if interpreted:
            env: dict[str, str] = {**os.environ, **_INTERPRETED}
            context: Any = multiprocessing.get_context("spawn")
        else:
            env = cpu_env({DSA: "1"})
            # One process imports SGLang, and the ranks are made from it.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([f"{__package__}.imports"])
        (port,) = LOCAL.free_ports(1)
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        with mock.patch.dict(os.environ, env):
            for number in range(count):
                here, there = context.Pipe()
                process = context.Process(
                    target=rank.serve, args=(number, count, port, there), daemon=True
                )
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
        self._answers()

    def ask(self, what: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((what, args, kwargs))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, RuntimeError):
                raise answer
        return answers

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
