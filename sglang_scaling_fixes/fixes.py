"""The manifest: what each fix is for, which releases need it, and whether it is in force.

The README's table, `doctor`, the startup log and `/server_info` all come from here.
A state is what a probe found after attaching, never what a version number suggests.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass

from sglang_scaling_fixes.attach import FIRST_RELEASE, LAST_RELEASE
from sglang_scaling_fixes.config import FIX_NAMES, Config
from sglang_scaling_fixes.errors import ScalingFixesError

logger = logging.getLogger(__name__)


class State(enum.StrEnum):
    """Whether a fix is in force in this process."""

    ARMED = "armed"
    NATIVE = "native"
    UNSUPPORTED = "unsupported"
    OFF = "off"


@dataclass(frozen=True)
class Status:
    """A fix's state with the reason, as reported everywhere."""

    name: str
    state: State
    reason: str

    @property
    def in_force(self) -> bool:
        return self.state in (State.ARMED, State.NATIVE)

    def as_dict(self) -> dict[str, str]:
        return {"name": self.name, "state": self.state.value, "reason": self.reason}


@dataclass(frozen=True)
class Fix:
    """One record of the manifest.

    `arm(config)` attaches the fix, proves it by behaviour and returns the reason it
    may be called armed (or `Native`, if there was nothing to attach); it raises
    `ScalingFixesError` when it cannot be in force.
    None: not part of this version of the package.
    """

    name: str
    breaks: str
    how: str
    first: str
    last: str
    upstream: str
    remove_when: str
    arm: Callable[[Config], str] | None


class Native(str):
    """The proof that a release does by itself all that a fix is for."""


def _arm_safe_reclaim(config: Config) -> str:
    from sglang_scaling_fixes.reclaim import arm

    return arm(config)


def _arm_hicache_ordering(config: Config) -> str:
    from sglang_scaling_fixes.ordering import arm

    proof, native = arm(config)
    return Native(proof) if native else proof


def _arm_spec_guard(config: Config) -> str:
    from sglang_scaling_fixes.specguard import arm

    return arm(config)


FIXES = (
    Fix(
        name="safe-reclaim",
        breaks="Prefill/decode disaggregation: KV slots of an aborted or timed-out request are "
        "reused while prefill may still write into them.",
        how="Gate at the decode allocators; slots return only with proof that no writer is left.",
        first=FIRST_RELEASE,
        last=LAST_RELEASE,
        upstream="sgl-project/sglang #35049 (frees without proof after 30 s), #38961",
        remove_when="upstream frees only on proof, retries its abort and survives room reuse",
        arm=_arm_safe_reclaim,
    ),
    Fix(
        name="hicache-ordering",
        breaks="HiCache: KV is read, sent or broadcast before it is loaded, or copied while a "
        "forward still writes it.",
        how="Waits on the streams, per layer or per copy, where a probe finds them missing.",
        first=FIRST_RELEASE,
        last=LAST_RELEASE,
        upstream="sgl-project/sglang #22811 (accessors, in 0.5.11), #36738 (load fence, in "
        "0.5.19), #39417",
        remove_when="upstream's LayerSplit prefetch and NIXL early send wait for the load",
        arm=_arm_hicache_ordering,
    ),
    Fix(
        name="layer-split",
        breaks="Prefill context parallelism: every rank stores every layer, or broadcasts whole "
        "pools.",
        how="Owners broadcast only the pages in use, a layer ahead.",
        first=FIRST_RELEASE,
        last=LAST_RELEASE,
        upstream="sgl-project/sglang LayerSplit (in 0.5.16)",
        remove_when="upstream filters its broadcast by page and double-buffers it",
        arm=None,
    ),
    Fix(
        name="spec-guard",
        breaks="A corrupted KV cache produces garbled or repeating text that nobody stops.",
        how="Watches every request's speculative acceptance; aborts with 503 and quarantines its "
        "cached prefix, for a retry elsewhere.",
        first=FIRST_RELEASE,
        last=LAST_RELEASE,
        upstream="none",
        remove_when="upstream watches acceptance per request",
        arm=_arm_spec_guard,
    ),
)
assert tuple(fix.name for fix in FIXES) == FIX_NAMES


def arm_all(config: Config) -> list[Status]:
    """Arm what `config` asks for in this process; report every fix.

    Never raises for a fix that cannot be armed: its status says so, and the
    caller refuses the start (`refusal`).
    """
    return [_arm_one(fix, config) for fix in FIXES]


def _arm_one(fix: Fix, config: Config) -> Status:
    if fix.arm is None:
        return Status(fix.name, State.UNSUPPORTED, "not part of this sglang-scaling-fixes yet")
    if fix.name not in (config.fixes or ()):
        return Status(fix.name, State.OFF, "not asked for")
    try:
        proof = fix.arm(config)
        state = State.NATIVE if isinstance(proof, Native) else State.ARMED
        return Status(fix.name, state, str(proof))
    except ScalingFixesError as error:
        return Status(fix.name, State.UNSUPPORTED, str(error))
    except Exception as error:  # a probe that broke proves nothing: never fail open
        logger.debug("arming %s failed", fix.name, exc_info=True)
        return Status(fix.name, State.UNSUPPORTED, f"{type(error).__name__}: {error}")


def refusal(statuses: list[Status], config: Config) -> str | None:
    """One line on why this process must not start, None when all that was asked is in force."""
    missing = [s for s in statuses if s.name in (config.fixes or ()) and not s.in_force]
    if not missing:
        return None
    reasons = "; ".join(f"{s.name}: {s.reason}" for s in missing)
    return f"asked for and not in force, not starting: {reasons}"
