"""The choke point: nothing a writer may still reach goes back to a free list.

Every path of stock SGLang that gives KV slots back (abort, time-out, its own
release deadline, retraction, eviction) ends in a `free*` method of the token
allocator or of the metadata-index allocator. The gate wraps those methods on the
two allocator *objects*. While an owner has given up slots that are not proven
free of writers, a free that touches them is kept as a call and replayed, as it
was made, once the ledger has its proof:

      free(indices) --- touches a given-up page? -- no --> stock
                               | yes
                               v
                      kept (indices cloned) ---- proof ----> stock

Cost: one truth test per free while nothing is given up. The look-up of indices
(which needs their values on the host, so a device sync) happens only between an
abort and the end of its release, or on every free with `--safe-reclaim-audit`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_scaling_fixes.alarm import end_server
from sglang_scaling_fixes.errors import AttachError
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.types import LedgerError

logger = logging.getLogger(__name__)

TOKEN_FREES = ("free", "free_full", "free_swa")
"""Methods that take token locations; a page is `location // page_size`."""
SEGMENT_FREES = ("free_segment", "free_full_segment", "free_swa_segment")
"""The same for a page-aligned piece of one request's row (0.5.2x)."""
PAGE_FREES = ("free_page_ids",)
"""Methods that take page numbers."""
COMPOSED_FREES = ("free_segments", "free_full_segments", "free_group_begin", "free_group_end")
"""Methods that only call the ones above on themselves."""


@dataclass(eq=False)
class Kept:
    """A free stock asked for, and the exposures that must all be proven before it happens."""

    call: Callable[[], None]
    waits: set[str]

    def release(self, lease: str) -> None:
        self.waits.discard(lease)
        if not self.waits:
            self.call()


@dataclass(eq=False)
class Slots:
    """What one exposure made reachable, and the frees kept for it.

    `sent` and `shared` are page numbers as they were sent, in the allocator's space:
    the request's own, and those of a shared prefix that state transfers may write
    too. Most exposures land and nobody looks, so they are sorted on demand: `own` and
    `pages` (both) are unique, int64. `aux`: the metadata slot, None when there is none.
    """

    exposure: Exposure
    sent: np.ndarray
    shared: Sequence[np.ndarray]
    aux: int | None
    aux_back: bool = False
    kept: list[Kept] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    tokens: int = 0
    """Token slots in kept frees, for reporting."""

    @functools.cached_property
    def own(self) -> np.ndarray:
        unique: np.ndarray = np.unique(self.sent.astype(np.int64))
        return unique

    @functools.cached_property
    def pages(self) -> np.ndarray:
        parts = [self.own, *(pages.astype(np.int64) for pages in self.shared)]
        unique: np.ndarray = np.unique(np.concatenate(parts))
        return unique

    @property
    def complete(self) -> bool:
        """Every exposed page is in a kept free: no ordinary free can touch one now."""
        return len(self.seen) == len(self.pages)


class Gate:
    """Wraps one token allocator and one metadata-index allocator of a decode rank."""

    def __init__(self, tokens: Any, metadata: Any, *, audit: bool = False) -> None:
        self._tokens, self._metadata = tokens, metadata
        self._page_size = int(tokens.page_size)
        self._audit = audit
        self._open: dict[str, Slots] = {}
        self._aux: dict[int, Slots] = {}
        self._watched: list[Slots] = []
        """Given-up exposures not yet completely withheld. Empty in the normal path."""

    def install(self) -> Gate:
        """Wrap the `free*` methods of both allocators, and `clear` of the pool's."""
        self._wrap(self._tokens, self._metadata)
        return self

    # -- events from the adapter ----------------------------------------------

    def exposed(
        self, exposure: Exposure, own: np.ndarray, shared: Sequence[np.ndarray], aux: int | None
    ) -> None:
        """Remember what `exposure` makes reachable: page numbers, any order, and `aux`."""
        slots = Slots(exposure, np.array(own), shared, aux)
        exposure.slots = self._open[exposure.lease] = slots
        if aux is not None:
            self._aux[aux] = slots

    def landed(self, exposure: Exposure) -> None:
        """The slots are ordinary from now on."""
        for kept in self._forget(exposure).kept:  # only the audit keeps any this early
            kept.release(exposure.lease)

    def gave_up(self, exposure: Exposure) -> None:
        """From here until complete, every free is looked at."""
        self._watched.append(self._slots(exposure))

    def settle(self) -> None:
        """Once per scheduler tick: stop looking for pages that are all withheld.

        Not earlier: one release may free the same pages in several calls (full
        and sliding-window halves). The metadata slot goes back in the same release,
        so a request that returned it and not all its KV has freed KV past the gate.
        """
        for slots in self._watched:
            if slots.aux_back and not slots.seen.issuperset(slots.own.tolist()):
                end_server(
                    f"safe-reclaim: room {slots.exposure.room} was released and "
                    f"{len(slots.own) - len(slots.seen)} of its KV pages went past the gate"
                )
        if self._watched:
            self._watched = [s for s in self._watched if not s.complete]

    def give_back(self, exposure: Exposure) -> int:
        """Replay the kept frees of a returned exposure. Returns the token slots freed."""
        slots = self._forget(exposure)
        if slots in self._watched:
            self._watched.remove(slots)
        for kept in slots.kept:
            kept.release(exposure.lease)
        return slots.tokens

    def owns_aux(self, aux: int, room: int) -> bool:
        """Whether metadata slot `aux` may be written on behalf of `room` now."""
        slots = self._aux.get(aux)
        return slots is not None and slots.exposure.room == room

    def metadata_slot(self, exposure: Exposure) -> int | None:
        return self._slots(exposure).aux

    @property
    def held_tokens(self) -> int:
        """Token slots of given-up exposures: kept here, or by stock's own deferral before."""
        given_up = (s.exposure for s in self._open.values() if s.exposure.given_up)
        return sum(self.tokens(exposure) for exposure in given_up)

    def tokens(self, exposure: Exposure) -> int:
        """Token slots that the exposure's own pages have."""
        return len(self._slots(exposure).own) * self._page_size

    def check_integrity(self, exposures: Sequence[Exposure]) -> None:
        """`LedgerError` where this gate and a ledger with these exposures contradict each other."""
        known = {exposure.lease: exposure for exposure in exposures}
        if strays := known.keys() ^ self._open.keys():
            raise LedgerError(f"open in the ledger or at the gate only: {sorted(strays)}")
        for lease, slots in self._open.items():
            if slots is not known[lease].slots:
                raise LedgerError(f"{lease}: its slots are another exposure's")
            if slots.aux is not None and slots.aux_back and slots.aux not in self._aux:
                raise LedgerError(f"{lease}: metadata slot {slots.aux} is withheld for nobody")
        for slots in self._watched:
            if slots.exposure.lease not in known or not slots.exposure.given_up:
                raise LedgerError(f"{slots.exposure.lease}: watched, and nobody gave it up")

    # -- internals --------------------------------------------------------------

    @staticmethod
    def _slots(exposure: Exposure) -> Slots:
        assert isinstance(exposure.slots, Slots)
        return exposure.slots

    def _forget(self, exposure: Exposure) -> Slots:
        slots = self._open.pop(exposure.lease)
        if slots.aux is not None and self._aux.get(slots.aux) is slots:
            del self._aux[slots.aux]
        return slots

    def _wrap(self, tokens: Any, metadata: Any) -> None:
        known = {*TOKEN_FREES, *SEGMENT_FREES, *PAGE_FREES, *COMPOSED_FREES}
        found = {n for n in dir(tokens) if n.startswith("free") and callable(getattr(tokens, n))}
        if unknown := found - known:
            raise AttachError(
                f"{type(tokens).__name__} has ways to free KV slots that safe-reclaim does "
                f"not know: {', '.join(sorted(unknown))}"
            )
        for name in found - set(COMPOSED_FREES):
            unit = 1 if name in PAGE_FREES else self._page_size
            setattr(tokens, name, self._gated(getattr(tokens, name), unit))
        stock_clear = tokens.clear

        @functools.wraps(stock_clear)
        def clear() -> Any:
            if self._open:
                raise RuntimeError(
                    "safe-reclaim: the KV pool was to be cleared while "
                    f"{len(self._open)} transfers may still write into it"
                )
            return stock_clear()

        tokens.clear = clear
        stock_free = metadata.free

        @functools.wraps(stock_free)
        def free(free_index: int) -> None:
            if (slots := self._aux.get(int(free_index))) is not None:
                self._keep_aux(slots, functools.partial(stock_free, free_index))
            else:
                stock_free(free_index)

        metadata.free = free

    def _gated(self, stock: Callable[..., Any], unit: int) -> Callable[..., Any]:
        @functools.wraps(stock)
        def gated(indices: Any, *args: Any, **kwargs: Any) -> Any:
            if (self._watched or (self._audit and self._open)) and self._kept(
                stock, unit, indices, args, kwargs
            ):
                return None
            return stock(indices, *args, **kwargs)

        return gated

    def _kept(
        self, stock: Callable[..., Any], unit: int, indices: Any, args: Any, kwargs: Any
    ) -> bool:
        """Keep this free if it touches a page some writer may still reach."""
        pages = np.unique(indices.detach().cpu().numpy().astype(np.int64) // unit)
        candidates = list(self._open.values()) if self._audit else self._watched
        touched = [(s, hit) for s in candidates if len(hit := pages[np.isin(pages, s.pages)])]
        if not touched:
            return False
        # The indices may be a view of a request's row, which is reused long before
        # the replay.
        call = functools.partial(stock, indices.clone(), *args, **kwargs)
        kept = Kept(call, {slots.exposure.lease for slots, _ in touched})
        for slots, hit in touched:
            if not slots.exposure.given_up:
                # Only the audit looks this far. Stock freed slots whose owner is
                # still waiting for its KV: keep them until that is decided.
                logger.error(
                    "safe-reclaim audit: %d pages of room %d were freed while its transfer "
                    "is open; they are kept",
                    len(hit),
                    slots.exposure.room,
                )
            slots.kept.append(kept)
            slots.seen.update(hit.tolist())
        per_index = 1 if unit == self._page_size else self._page_size
        touched[0][0].tokens += int(indices.numel()) * per_index
        return True

    def _keep_aux(self, slots: Slots, call: Callable[[], None]) -> None:
        if not slots.exposure.given_up:
            end_server(
                f"safe-reclaim: room {slots.exposure.room} gave its metadata slot back while "
                "its transfer is open and nobody gave it up"
            )
        slots.aux_back = True
        slots.kept.append(Kept(call, {slots.exposure.lease}))
