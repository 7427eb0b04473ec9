"""Resume: a request may bring the tokens of its answer that another server generated before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_scaling_fixes import http
from sglang_scaling_fixes.errors import ConfigError
from sglang_scaling_fixes.fix import Armed, Fix
from sglang_scaling_fixes.resume import points
from sglang_scaling_fixes.resume.metrics import RESUME

if TYPE_CHECKING:
    from sglang_scaling_fixes.config import Config

logger = logging.getLogger(__name__)


class Resume(Fix):
    """Takes the tokens up in every scheduler; reads and writes HTTP in the main process."""

    name = points.NAME
    default = True
    breaks = (
        "A stream that breaks is lost: no other server can go on with its penalties, grammar, "
        "limits and parsers."
    )
    how = (
        "Takes up a request with the tokens of its answer as stock takes up one that it retracted "
        "itself, and sends only what is new."
    )
    stock = (("0.5.11", "nothing"),)
    upstream = "none"
    remove_when = "upstream takes the tokens of a request's answer with the request"
    attach_points = points.ATTACH_POINTS
    metrics = (RESUME,)

    def check(self, server_args: Any, config: Config) -> None:
        """Where HTTP is spoken by processes that load no plugins, the field is not seen."""
        elsewhere = http.spoken_elsewhere(getattr(server_args, "tokenizer_worker_num", None))
        if elsewhere is None:
            return
        why = f"{elsewhere}: plugins are not loaded where HTTP is spoken then"
        if self.name in config.named:
            raise ConfigError(f"{why}, and no request can be resumed; start without {self.name}")
        logger.warning("sglang-scaling-fixes: resume: %s; no request can be resumed here", why)

    def arm(self, config: Config) -> Armed:
        from sglang_scaling_fixes.resume import attach, probe

        attach.attach()
        attach.require_wrapped()
        probe.run()
        return Armed("attached and proven on this release's own classes")

    def bind(self, scheduler: Any, server_args: Any, config: Config) -> None:
        from sglang_scaling_fixes.resume import attach

        attach.bind(scheduler, server_args)

    def report(self) -> dict[str, Any] | None:
        from sglang_scaling_fixes.resume import requests

        return {"resume": requests.counts.metrics.report()}

    def middleware(self) -> Sequence[Any]:
        from sglang_scaling_fixes.resume.middleware import Resuming

        return (Resuming,)


FIX = Resume()
