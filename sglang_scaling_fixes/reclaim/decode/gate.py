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
abort and the end of its release, or on every free with `--safe-reclaim-audit`. What it
takes does not grow with what is held.

State transfers of some releases also write the pages of a shared prefix, which the radix tree
keeps when the request is released. Nobody would have to free them, so looking for them would never
end. The gate has the tree lock them instead, until there is proof: no release of stock evicts
what is locked, and its accounts stay right, which kept evictions would upset.
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
from sglang_scaling_fixes.reclaim.decode.page_map import PageMap, every
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


NOTHING: np.ndarray = np.zeros(0, np.int64)

Lock = Callable[[], tuple[int, Callable[[], None]] | None]
"""Has the radix tree lock the prefix that a request shares: how many tokens long it is, and what
unlocks it. None: this cannot be done."""


def no_lock() -> None:
    """`Lock` of a request that has none."""


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
    the request's own, and for each kind of state all pages of its row, those of a shared prefix
    first. Most exposures land and nobody looks, so they are sorted only then.
    `aux`: the metadata slot, None when there is none.
    """

    exposure: Exposure
    sent: np.ndarray
    shared: Sequence[np.ndarray]
    aux: int | None
    aux_back: bool = False
    kept: list[Kept] = field(default_factory=list)
    tokens: int = 0
    """Token slots in kept frees, for reporting."""
    unlock: Callable[[], None] | None = None
    """Ends the tree's lock on the shared prefix, None where there is none."""
    own: np.ndarray = field(default_factory=lambda: NOTHING)
    """`sent`: unique, in order."""
    prefix: list[np.ndarray] = field(default_factory=list)
    """Of each kind of state, where in its row pages lie that are not the request's own."""
    pages: np.ndarray = field(default_factory=lambda: NOTHING)
    """What is watched: unique page numbers, in order."""
    seen: np.ndarray = field(default_factory=lambda: NOTHING)
    """For each of `pages` whether it is in a kept free."""

    def sort(self) -> None:
        """Find `own` and `prefix`."""
        own: np.ndarray = self.sent.astype(np.int64)
        self.own = own if every(own[1:] > own[:-1]) else np.unique(own)  # they come in order
        self.prefix = [
            np.flatnonzero(np.isin(pages, self.own, invert=True)) for pages in self.shared
        ]

    def watch(self, *, prefix: bool) -> np.ndarray:
        """The pages to look for from now on, with those of the prefix or without."""
        parts = [p[there] for p, there in zip(self.shared, self.prefix, strict=True) if prefix]
        self.pages = np.unique(np.concatenate([self.own, *parts])) if parts else self.own
        self.seen = np.zeros(len(self.pages), bool)
        return self.pages

    def see(self, pages: np.ndarray) -> None:
        """These of `pages` are in a kept free."""
        if len(pages) == len(self.pages) and every(pages == self.pages):
            self.seen[:] = True  # nearly always: one free of everything
        else:
            self.seen[np.searchsorted(self.pages, pages)] = True

    @property
    def missing(self) -> int:
        """How many of its own pages no kept free had."""
        return int(np.count_nonzero(~self.seen[np.searchsorted(self.pages, self.own)]))

    @property
    def complete(self) -> bool:
        """Every page is in a kept free: no ordinary free can touch one now."""
        return every(self.seen)


class Gate:
    """Wraps one token allocator and one metadata-index allocator of a decode rank."""

    def __init__(self, tokens: Any, metadata: Any, *, audit: bool = False) -> None:
        self._tokens, self._metadata = tokens, metadata
        self._page_size = int(tokens.page_size)
        self._audit = audit
        self._open: dict[str, Slots] = {}
        self._aux: dict[int, Slots] = {}
        self._watched = PageMap(int(tokens.size) // self._page_size + 1)
        """Given-up exposures not yet completely withheld. Empty in the normal path."""
        self._touched: dict[str, Slots] = {}
        """Of them those that frees have touched since the last tick."""
        self.held_tokens = 0
        """Token slots of given-up exposures: kept here, or by stock's own deferral before."""

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
        if self._audit:
            slots.sort()
            self._watched.add(exposure.lease, slots.watch(prefix=True))

    def landed(self, exposure: Exposure) -> None:
        """The slots are ordinary from now on."""
        for kept in self._forget(exposure).kept:  # only the audit keeps any this early
            kept.release(exposure.lease)

    def gave_up(self, exposure: Exposure, lock: Lock = no_lock) -> None:
        """From here until complete, every free is looked at. `lock`: of its request's prefix,
        which the request itself still has locked."""
        slots = self._slots(exposure)
        slots.sort()
        exposure.tokens, exposure.metadata = len(slots.own) * self._page_size, slots.aux is not None
        self.held_tokens += exposure.tokens
        if any(map(len, slots.prefix)):
            slots.unlock = self._locked(slots, lock)
        if exposure.lease not in self._watched:
            self._watched.add(exposure.lease, slots.watch(prefix=slots.unlock is None))

    def _locked(self, slots: Slots, lock: Lock) -> Callable[[], None] | None:
        """Have the prefix locked. None: it is not, or not all of it, and must be watched."""
        if (taken := lock()) is None:
            return None
        tokens, unlock = taken
        # A prefix that is still to be loaded from the host is longer than what the tree has.
        if all(int(p[-1]) < tokens // self._page_size for p in slots.prefix if len(p)):
            return unlock
        unlock()
        return None

    def settle(self) -> None:
        """Once per scheduler tick: stop looking for pages that are all withheld.

        Not earlier: one release may free the same pages in several calls (full
        and sliding-window halves). The metadata slot goes back in the same release,
        so a request that returned it and not all its KV has freed KV past the gate.
        """
        for lease, slots in self._touched.items():
            if lease not in self._watched or not slots.exposure.given_up:
                continue
            if slots.complete:
                if not self._audit:
                    self._watched.remove(lease)
            elif slots.aux_back and slots.missing:
                end_server(
                    f"safe-reclaim: room {slots.exposure.room} was released and "
                    f"{slots.missing} of its KV pages went past the gate"
                )
        self._touched.clear()

    def give_back(self, exposure: Exposure) -> tuple[int, int]:
        """Replay the kept frees of a returned exposure.

        Returns the token slots freed, and those that stock itself has not freed yet.
        """
        still = 0
        if exposure.lease in self._watched:
            still = self._slots(exposure).missing * self._page_size
        self.held_tokens -= exposure.tokens
        slots = self._forget(exposure)
        for kept in slots.kept:
            kept.release(exposure.lease)
        if slots.unlock is not None:
            slots.unlock()
        return slots.tokens, still

    def owns_aux(self, aux: int, room: int) -> bool:
        """Whether metadata slot `aux` may be written on behalf of `room` now."""
        slots = self._aux.get(aux)
        return slots is not None and slots.exposure.room == room

    def metadata_slot(self, exposure: Exposure) -> int | None:
        return self._slots(exposure).aux

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
            if lease in self._watched and not (self._audit or slots.exposure.given_up):
                raise LedgerError(f"{lease}: watched, and nobody gave it up")
        held = sum(exposure.tokens for exposure in exposures if exposure.given_up)
        if held != self.held_tokens:
            raise LedgerError(f"{held} token slots are held, and {self.held_tokens} are counted")

    # -- internals --------------------------------------------------------------

    @staticmethod
    def _slots(exposure: Exposure) -> Slots:
        assert isinstance(exposure.slots, Slots)
        return exposure.slots

    def _forget(self, exposure: Exposure) -> Slots:
        slots = self._open.pop(exposure.lease)
        if exposure.lease in self._watched:
            self._watched.remove(exposure.lease)
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
            if self._watched and self._kept(stock, unit, indices, args, kwargs):
                return None
            return stock(indices, *args, **kwargs)

        return gated

    def _kept(
        self, stock: Callable[..., Any], unit: int, indices: Any, args: Any, kwargs: Any
    ) -> bool:
        """Keep this free if it touches a page some writer may still reach."""
        pages = indices.detach().cpu().numpy().astype(np.int64, copy=False)
        if unit > 1:
            pages = pages // unit
            pages = pages[np.flatnonzero(np.diff(pages, prepend=-1))]  # neighbours share one
        found = self._watched.find(pages)
        if not found:
            return False
        # The indices may be a view of a request's row, which is reused long before
        # the replay.
        call = functools.partial(stock, indices.clone(), *args, **kwargs)
        kept = Kept(call, set(found))
        touched = [(self._open[lease], hit) for lease, hit in found.items()]
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
            slots.see(hit)
            self._touched[slots.exposure.lease] = slots
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
        self._touched[slots.exposure.lease] = slots
        slots.kept.append(Kept(call, {slots.exposure.lease}))
