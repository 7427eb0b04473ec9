"""Objects that stand in for what a probe does not build: a model, a server, another machine.

A probe runs a release's own methods on bare objects. Releases look at different attributes of
them, and most of those do not matter to what is asked. Dunder names are never made up: Python
asks for them to find out what an object is.
"""

from __future__ import annotations

from typing import Any


def _not_a_dunder(name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)


class Lenient:
    """Has the attributes it is given. Every other attribute reads as None."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        _not_a_dunder(name)
        return None


class Empty(Lenient):
    """Has the attributes it is given. Every other attribute reads as an empty dict."""

    def __getattr__(self, name: str) -> Any:
        _not_a_dunder(name)
        return {}


class Anything:
    """Every attribute, every call and every `with` gives the object itself."""

    def __getattr__(self, name: str) -> Any:
        _not_a_dunder(name)
        return self

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_args: Any) -> None: ...


class No:
    """False, whether a release reads it as an attribute or calls it as a method."""

    def __bool__(self) -> bool:
        return False

    def __call__(self) -> bool:
        return False
