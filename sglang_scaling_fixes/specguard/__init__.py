"""The anomaly guard: generations whose speculative decoding betrays a corrupted KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes import vouch
from sglang_scaling_fixes.fix import Armed, Fix
from sglang_scaling_fixes.specguard import points
from sglang_scaling_fixes.specguard.flags import SETTINGS
from sglang_scaling_fixes.specguard.metrics import SPEC_GUARD

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config
    from sglang_scaling_fixes.refusals import Edit
    from sglang_scaling_fixes.routes import Answer


class AnomalyGuard(Fix):
    """Watches in every scheduler; sets the type of its 503s where HTTP is spoken."""

    name = points.NAME
    default = True
    breaks = "A corrupted KV cache produces garbled or repeating text that nobody stops."
    how = (
        "Watches every request's speculative acceptance; aborts with 503 and quarantines its "
        "cached prefix, for a retry elsewhere."
    )
    stock = (("0.5.11", "nothing"),)
    upstream = "none"
    remove_when = "upstream watches acceptance per request"
    settings = SETTINGS
    attach_points = points.ATTACH_POINTS
    metrics = (SPEC_GUARD,)

    def check(self, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.specguard import settings

        settings.check(server_args, config)

    def arm(self, config: Config) -> Armed:
        from sglang_scaling_fixes.attach import require_wrapped
        from sglang_scaling_fixes.specguard import attach, probe, settings

        attach.use(settings.secret(config))
        attach.attach()
        (absent,) = (point for point in attach.FINISH if point != attach.finish_point())
        require_wrapped(point for point in points.ATTACH_POINTS if point != absent)
        probe.run()
        return Armed(f"{config.guard}: attached and proven on this release's own classes")

    def bind(self, scheduler: Any, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.specguard import attach

        attach.bind(scheduler, server_args, config)

    def report(self) -> dict[str, Any] | None:
        from sglang_scaling_fixes.specguard import attach
        from sglang_scaling_fixes.specguard.guard import SpecGuard

        if (guard := SpecGuard.current) is not None:
            return {"spec_guard": guard.report()}
        why = attach.nothing_to_judge
        return None if why is None else {"spec_guard": {"action": "none", "reason": why}}

    def routes(self) -> Mapping[str, Answer]:
        from sglang_scaling_fixes.specguard import attach, notify

        return {vouch.FALSE_ALARM_PATH: partial(notify.withdraw, secret=attach.secret)}

    def error_edits(self) -> Sequence[Edit]:
        from sglang_scaling_fixes.specguard import error_type

        return (error_type.edit,)


FIX = AnomalyGuard()
