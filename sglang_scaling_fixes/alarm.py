"""The end of a server that must not go on, in a way that stock cannot catch and carry on from."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from typing import NoReturn

logger = logging.getLogger(__name__)


def end_server(message: str) -> NoReturn:
    """Say why, tell the parent as a stock scheduler tells of its own end, and leave.

    Stock wraps much of what calls us in `except Exception` (a request's failure, a deferred
    release); what is raised here passes through all of it.
    """
    logger.critical("sglang-scaling-fixes: %s", message)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent.pid, signal.SIGQUIT)
    raise SystemExit(f"sglang-scaling-fixes: {message}")
