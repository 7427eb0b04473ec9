"""What every rank needs, imported once."""

import sglang_scaling_fixes.layersplit.pool  # noqa: F401
