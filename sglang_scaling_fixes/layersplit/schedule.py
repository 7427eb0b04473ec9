"""When each layer travels: one layer ahead, and always in the order of the layers.

There are two scratches; layer `l` uses scratch `l % 2`. A layer may be sent as soon as the last
reader of its scratch has been launched:

    forward pass     | layer 0   | layer 1   | layer 2   |
    broadcasts     0 | 1         | 2         | 3         |

    begin      nothing of this pass has been launched: layers 0 and 1
    enter(l)   the first access to layer l: all of layer l - 1 has been launched, so layer l + 1
    leave(l)   stock says that attention of layer l was launched, and its MoE is not: layer l + 2

Every rank runs the same layers in the same order, so every rank issues the same collectives in the
same order. That is what keeps them from waiting for each other for ever.
"""

from __future__ import annotations

SCRATCHES = 2


class Schedule:
    """Which layers of the current pass to send now. Knows no tensor and no stream."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._sent = layers  # before the first pass there is nothing to send

    def begin(self) -> range:
        """A new pass: layers to send at once."""
        self._sent = 0
        return self._up_to(SCRATCHES - 1)

    def enter(self, layer: int) -> range:
        return self._up_to(layer + 1)

    def leave(self, layer: int) -> range:
        return self._up_to(layer + SCRATCHES)

    def _up_to(self, layer: int) -> range:
        first = self._sent
        self._sent = max(first, min(layer + 1, self._layers))
        return range(first, self._sent)
