"""Finds what releases call by different names, and calls it with the arguments it knows.

A class or function is looked up under every name and place that it has had. Arguments are offered
by name, and it gets those it has. `Moved` is raised where that is not enough.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from sglang_scaling_fixes.errors import ScalingFixesError


class Moved(ScalingFixesError):
    """A class or function of SGLang is not where this checker looks for it."""


class NotThere(Exception):
    """This release does not have the part that a hazard is about."""


def find(*targets: str) -> Any:
    """The first `module:name` that exists; `Moved` names the last known place."""
    why = ""
    for target in targets:
        module, _, name = target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("sglang"):
                why = f" ({error})"
        except AttributeError:
            continue
        except Exception as error:
            why = f" ({type(error).__name__}: {error})"
    raise Moved(f"expected {' or '.join(targets)}{why}")


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call(function: Callable[..., Any], **offered: Any) -> Any:
    """Call with those of the offered arguments that the function has."""
    known = dict(inspect.signature(function).parameters)
    if inspect.isclass(function) and any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for base in function.__mro__[1:-1]:  # what a subclass passes on
            known = {**inspect.signature(vars(base).get("__init__", object)).parameters, **known}
        known = {name: p for name, p in known.items() if name != "self"}
    missing = [
        name
        for name, p in known.items()
        if p.default is p.empty and p.kind in _NAMED and name not in offered
    ]
    if missing:
        raise Moved(f"{getattr(function, '__qualname__', function)} now needs {missing}")
    return function(**{name: value for name, value in offered.items() if name in known})
