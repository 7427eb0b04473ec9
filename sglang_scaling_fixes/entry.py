"""What SGLang's plugin loader imports; only the standard library, so that it always can.

Stock logs a plugin that cannot be imported and starts without it.
"""

from __future__ import annotations

import os

# `config.PLUGIN_ENV`, and the settings that arm their fix; those modules may be what cannot be
# imported.
_PLUGIN, _GUARD = "SGLANG_SCALING_FIXES_PLUGIN", "SGLANG_SCALING_FIXES_SPEC_GUARD"


def activate() -> None:
    """`plugin.activate`; where a fix was asked for and that cannot be had, no start."""
    try:
        from sglang_scaling_fixes import plugin
    except Exception as error:
        asked = [name for name in (_PLUGIN, _GUARD) if _asks(name)]
        if not asked:
            raise
        raise SystemExit(
            f"sglang-scaling-fixes: {asked[0]}={os.environ[asked[0]]} and the plugin cannot be "
            f"imported ({type(error).__name__}: {error}); install it anew, or unset it"
        ) from error
    plugin.activate()


def _asks(name: str) -> bool:
    return os.environ.get(name, "").strip() not in ("", "none")
