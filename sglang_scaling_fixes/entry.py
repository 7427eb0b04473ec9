"""What SGLang's plugin loader imports; only the standard library, so that it always can.

Stock logs a plugin that cannot be imported and starts without it.
"""

from __future__ import annotations

import os

_ARMED = "SGLANG_SCALING_FIXES_PLUGIN"  # `config.PLUGIN_ENV`, which may be what fails to import


def activate() -> None:
    """`plugin.activate`; where a fix was asked for and that cannot be had, no start."""
    try:
        from sglang_scaling_fixes import plugin
    except Exception as error:
        if os.environ.get(_ARMED, "none") != "none":
            raise SystemExit(
                f"sglang-scaling-fixes: {_ARMED}={os.environ[_ARMED]} and the plugin cannot be "
                f"imported ({type(error).__name__}: {error}); install it anew, or unset it"
            ) from error
        raise
    plugin.activate()
