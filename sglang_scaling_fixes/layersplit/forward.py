"""One forward pass over a split pool: its plan, and the broadcasts that are under way for it."""

from __future__ import annotations

from collections.abc import Callable

from sglang_scaling_fixes.layersplit.lane import Sent
from sglang_scaling_fixes.layersplit.plan import Plan
from sglang_scaling_fixes.layersplit.schedule import Schedule

Send = Callable[[int], Sent]


class Forward:
    """Sends layers as they fall due and makes their readers wait. Layers count from 0."""

    def __init__(self, plan: Plan, layers: int, send: Send, paged_index: bool) -> None:
        """`send(layer)` launches the broadcast of a layer.

        `paged_index`: the indexer reads pages in place, through tables that were translated.
        """
        self.plan = plan
        self.paged_index = paged_index
        self._send = send
        self._sends = len(plan.prefix) > 0  # the same on every rank
        self._schedule = Schedule(layers)
        self._sent: dict[int, Sent] = {}
        self._entered: int | None = None
        self._launch(self._schedule.begin())

    def enter(self, layer: int) -> None:
        """Before each access to a layer: what is launched from now on finds its prefix there.

        Writers wait as well: a page that a prefix fills partly is sent first and then written to.
        """
        self._entered = layer
        self._launch(self._schedule.enter(layer))
        if self._sends:
            self._sent[layer].wait()

    def leave(self) -> None:
        """Attention of the layer that was entered last has been launched."""
        if self._entered is not None:
            self._launch(self._schedule.leave(self._entered))

    def _launch(self, layers: range) -> None:
        if self._sends:
            for layer in layers:
                self._sent[layer] = self._send(layer)
