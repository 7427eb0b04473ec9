"""A fix that consists of waits, each of them attached only where a probe finds that it is missing.

Nothing here decides by a version number: the same probes are asked before and after attaching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.fix import Armed, Native


@dataclass(frozen=True)
class Part:
    """One wait: does the release have the code (`there`), does it `hold`, how it is attached."""

    name: str
    there: Callable[[], bool]
    holds: Callable[[], bool]
    attach: Callable[[], None]


@dataclass
class Parts:
    """The parts of one fix, and what became of them in this process."""

    make: Callable[[], list[Part]]
    """Makes them anew for each look: what they ask may import the release."""
    nothing: str
    """The proof where the release has the code of none of them."""
    attached: list[str] = field(default_factory=list)
    native: list[str] = field(default_factory=list)

    @property
    def armed(self) -> bool:
        """Whether `arm` has found parts here."""
        return bool(self.attached or self.native)

    def arm(self) -> Armed | Native:
        """Attach what is missing. `AttachError` names the first wait that does not hold then."""
        if not self.armed:
            for part in self.make():
                if not part.there():
                    continue
                if part.holds():
                    self.native.append(part.name)
                    continue
                part.attach()
                self.attached.append(part.name)
        for part in self.make():
            if part.there() and not part.holds():
                raise AttachError(f"probe: {part.name} does not hold")
        if not self.armed:
            return Native(self.nothing)
        if not self.attached:
            return Native(f"this release does all of it: {', '.join(self.native)}")
        native = f"; native: {', '.join(self.native)}" if self.native else ""
        return Armed(f"attached and proven: {', '.join(self.attached)}{native}")
