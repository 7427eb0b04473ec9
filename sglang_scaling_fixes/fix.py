"""The one shape of a fix. Each package that is one exports an object of it as `FIX`.

    check    before a server starts: can this fix protect a server with these arguments?
    arm      attach it in this process, once, and prove it by behaviour
    bind     after stock has built its scheduler: what the fix needs of it is there
    report   what it has counted in this process, for `/server_info`

`fixes.py` lists them. The command line, the plugin, the doctor, the contract tests and the
generated tables go through that list and know no fix by its name.

This module and the top of every such package import neither torch nor SGLang: they are read
wherever the plugin is installed, whether or not a fix is asked for.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_scaling_fixes.attach import AttachPoint
from sglang_scaling_fixes.metrics import Family

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config, Setting
    from sglang_scaling_fixes.readiness import Report
    from sglang_scaling_fixes.refusals import Edit
    from sglang_scaling_fixes.routes import Answer


@dataclass(frozen=True)
class Armed:
    """The fix is attached in this process; `proof` says in words what was proven of it."""

    proof: str


@dataclass(frozen=True)
class Native:
    """This release does by itself all that the fix is for; `proof` says in words how it is known.

    Nothing was attached.
    """

    proof: str


class Fix(abc.ABC):
    """One fix: what it is for, what it touches and counts, and how it comes into force."""

    name: ClassVar[str]
    """As `--plugin` takes it."""
    default: ClassVar[bool]
    """Whether a bare `--plugin` arms it: it is safe without a decision by the operator."""

    breaks: ClassVar[str]
    """What goes wrong without it."""
    how: ClassVar[str]
    """What it does against that."""
    stock: ClassVar[tuple[tuple[str, str], ...]]
    """`(release, what stock does by itself from this release on)`, oldest first."""
    native: ClassVar[tuple[str, ...]] = ()
    """The releases of `stock` from which, up to the next one there, nothing has to be attached."""
    unsupported: ClassVar[tuple[str, ...]] = ()
    """The same, where it cannot be in force: stock lacks what it mends."""
    upstream: ClassVar[str]
    """Where upstream has worked on it."""
    remove_when: ClassVar[str]
    """What upstream must do before this fix can be dropped."""

    settings: ClassVar[tuple[Setting, ...]] = ()
    attach_points: ClassVar[tuple[AttachPoint, ...]] = ()
    metrics: ClassVar[tuple[Family, ...]] = ()

    missing: ClassVar[str] = ""
    """Why this version of the package does not have it; empty where it has."""

    def check(self, server_args: Any, config: Config) -> None:  # noqa: B027, may have none
        """Raise `ConfigError`, naming flag, value and remedy, for a server it cannot protect.

        Asked in the main process when the flags have been parsed, and again in each scheduler.
        """

    @abc.abstractmethod
    def arm(self, config: Config) -> Armed | Native:
        """Attach, once per process, and prove by behaviour; each call proves it anew.

        Raises `ScalingFixesError` where it cannot be in force. Never answers from a version number.
        """

    def bind(  # noqa: B027, may need nothing
        self, scheduler: Any, server_args: Any, config: Config
    ) -> None:
        """Called once stock has built its scheduler: take from it what the fix needs.

        Raises `ScalingFixesError` where something is not there; the server then does not start.
        """

    def report(self) -> dict[str, Any] | None:
        """`{part: counts}` of this process for `/server_info`; None where it has no part here."""
        return None

    def obstacle(self) -> str | None:
        """Why a server that needs this fix would not start on this machine, although it can be
        armed there: what `check` will say to some roles. Asked by the doctor, which has no role.
        """
        return None

    def unready(self, report: Report) -> str | None:
        """Why a server with a scheduler that reports this takes no request, None if it does."""
        del report
        return None

    def routes(self) -> Mapping[str, Answer]:
        """What the server's own port answers to a POST beside stock's paths, by path."""
        return {}

    def error_edits(self) -> Sequence[Edit]:
        """What its 503s must say in HTTP that stock would not let them say."""
        return ()

    def middleware(self) -> Sequence[Any]:
        """ASGI middleware right around stock's routes; each is called with the application."""
        return ()
