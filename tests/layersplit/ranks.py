"""Ranks of a split pool in processes of their own, asked all at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.lab.servers.link import LOCAL

from . import rank

ENV = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Ranks:
    """`ask` runs a method of `rank.Rank` on every rank, and returns what each answered."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        (port,) = LOCAL.free_ports(1)
        before = {name: os.environ.get(name) for name in ENV}
        os.environ.update(ENV)  # Triton reads it when it is imported
        self._pipes, self._processes = [], []
        try:
            for number in range(count):
                here, there = context.Pipe()
                process = context.Process(
                    target=rank.serve, args=(number, count, port, there), daemon=True
                )
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
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
