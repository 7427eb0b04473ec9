"""The manifest: every fix of the project, and whether each is in force in this process.

To add a fix, add its package's `FIX` here; everything else goes through this tuple. The README's
tables, `docs/fixes.md`, `doctor`, the startup log and `/server_info` all come from it.
A state is what a probe found after attaching, never what a version number suggests.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass

from sglang_scaling_fixes import points
from sglang_scaling_fixes.config import Config
from sglang_scaling_fixes.early_send_ordering import FIX as EARLY_SEND_ORDERING
from sglang_scaling_fixes.errors import ScalingFixesError
from sglang_scaling_fixes.fix import Fix, Native
from sglang_scaling_fixes.layersplit import FIX as LAYER_SPLIT
from sglang_scaling_fixes.ordering import FIX as HICACHE_ORDERING
from sglang_scaling_fixes.reclaim import FIX as SAFE_RECLAIM
from sglang_scaling_fixes.resume import FIX as RESUME
from sglang_scaling_fixes.specguard import FIX as SPEC_GUARD

logger = logging.getLogger(__name__)

FIXES: tuple[Fix, ...] = (
    SAFE_RECLAIM,
    EARLY_SEND_ORDERING,
    HICACHE_ORDERING,
    LAYER_SPLIT,
    SPEC_GUARD,
    RESUME,
)
"""In the order in which they are reported."""

FIX_NAMES = tuple(fix.name for fix in FIXES)
DEFAULT_FIXES = tuple(fix.name for fix in FIXES if fix.default)
"""What a bare `--plugin` arms."""
SETTINGS = tuple(setting for fix in FIXES for setting in fix.settings)
ATTACH_POINTS = (*points.ATTACH_POINTS, *(point for fix in FIXES for point in fix.attach_points))
"""Every place in stock SGLang that this project touches or relies on."""


class FixState(enum.StrEnum):
    """Whether a fix is in force in this process."""

    ARMED = "armed"
    NATIVE = "native"
    UNSUPPORTED = "unsupported"
    OFF = "off"


@dataclass(frozen=True)
class Status:
    """A fix's state with the reason, as reported everywhere."""

    name: str
    state: FixState
    reason: str

    @property
    def in_force(self) -> bool:
        return self.state in (FixState.ARMED, FixState.NATIVE)

    def as_dict(self) -> dict[str, str]:
        return {"name": self.name, "state": self.state.value, "reason": self.reason}


def asked(config: Config) -> list[Fix]:
    """The fixes that `config` asks for, in the manifest's order."""
    return [fix for fix in FIXES if fix.name in (config.fixes or ())]


def arm_all(config: Config) -> list[Status]:
    """Arm what `config` asks for in this process; report every fix.

    Never raises for a fix that cannot be armed: its status says so, and the
    caller refuses the start (`refusal`).
    """
    return [_arm_one(fix, config) for fix in FIXES]


def _arm_one(fix: Fix, config: Config) -> Status:
    if fix.missing:
        return Status(fix.name, FixState.UNSUPPORTED, fix.missing)
    if fix not in asked(config):
        return Status(fix.name, FixState.OFF, "not asked for")
    try:
        found = fix.arm(config)
        state = FixState.NATIVE if isinstance(found, Native) else FixState.ARMED
        return Status(fix.name, state, found.proof)
    except ScalingFixesError as error:
        return Status(fix.name, FixState.UNSUPPORTED, str(error))
    except Exception as error:  # a probe that broke proves nothing: never fail open
        logger.debug("arming %s failed", fix.name, exc_info=True)
        return Status(fix.name, FixState.UNSUPPORTED, f"{type(error).__name__}: {error}")


def refusal(statuses: list[Status], config: Config) -> str | None:
    """One line on why this process must not start, None when all that was asked is in force."""
    missing = [s for s in statuses if s.name in (config.fixes or ()) and not s.in_force]
    if not missing:
        return None
    reasons = "; ".join(f"{s.name}: {s.reason}" for s in missing)
    return f"asked for and not in force, not starting: {reasons}"


def raised_by(error: BaseException) -> Fix | None:
    """The fix whose code raised `error`, None where no frame of it belongs to one.

    An error that leaves stock's own code has passed through our wrappers and stock's frames; the
    innermost frame that is a fix's tells whose it is.
    """
    found = None
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        for fix in FIXES:
            package = type(fix).__module__
            if module == package or module.startswith(f"{package}."):
                found = fix
        trace = trace.tb_next
    return found
