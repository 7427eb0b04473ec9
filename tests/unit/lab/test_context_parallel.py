"""The stand-in for several ranks of one server."""

import os
from types import SimpleNamespace

import pytest

from sglang_scaling_fixes import import_hooks
from sglang_scaling_fixes.lab.runtime import DSA
from sglang_scaling_fixes.lab.standins import context_parallel

BIND = "SGLANG_CPU_OMP_THREADS_BIND"


@pytest.mark.parametrize(("own", "bind"), [({}, "|".join("00000000")), ({BIND: "1|2"}, "1|2")])
def test_ranks_have_cores_and_no_nccl(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str], bind: str
) -> None:
    seen: dict[str, object] = {}
    stock = SimpleNamespace(init_model_parallel_group=lambda *_args, **kwargs: seen.update(kwargs))
    environ = {DSA: "1", **own}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(import_hooks, "after_import", lambda _name, hook: hook(stock))
    context_parallel.install()
    stock.init_model_parallel_group([[0, 1]], 0, "gloo", use_pynccl=True, group_name="tp")
    assert seen == {"use_pynccl": False, "group_name": "tp"}
    assert environ[BIND] == bind


def test_other_models_run_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(import_hooks, "after_import", None)
    context_parallel.install()
