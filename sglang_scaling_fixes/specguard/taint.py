"""Suspect prefixes: KV of an anomalous request that no later request may read.

A request reads the KV of its tokens' path in the prefix cache, from the first page on, within its
namespace (SGLang's `extra_key`). Any page of the path may be the corrupt one. All KV below a
corrupt page was computed from it. So the whole path is suspect, and so is what lies below it:

    namespace "a":      page 1 -- page 2 -- page 3      aborted: all of it is suspect, from page 1
                               \\- page 4               its neighbour read page 1 too
    namespace "a|kv-anomaly-1":    page 1 -- ...        later requests begin here, empty

Later requests of namespace "a" that begin alike get another namespace. SGLang's caches share
nothing across namespaces. So these requests do not match the old path, and their own KV is not
merged into it. No later request reads the old path, and the cache evicts it as the least recently
used. Requests that read it already go on; the guard watches them too.

Suspicion must not be a weapon. One cheap request may be called an anomaly for its text alone:

    who is moved    those whose first `BEGINNING` tokens are the accused request's: its first page
                    if that is larger, its whole prompt if that is shorter
    how often       a beginning gets one new namespace in `Limits.interval`. Meanwhile an accusation
                    covers the accused request's whole prompt only, `Limits.paths` times at most
    not again       a request that ran in a namespace which is left already moves nobody
    how many        the oldest suspicion gives way at `Limits.suspicions`: nobody has read its path
                    for the longest time, so it is the likeliest to be evicted
    how long        for `Limits.life`, or until it is withdrawn as a false alarm

What is not covered follows from that: pages that only the first tokens of a beginning fill; a page
that became corrupt in the new namespace within the interval, for those who share less than the
whole prompt; and a path that is still cached when its suspicion ends.

The path is not evicted at once, because nodes in use cannot be evicted, and because each cache of
each release would need a way of its own.

No I/O. Time is a count that all ranks share (forward passes), because their clocks differ. All
ranks see the same requests and anomalies in the same order, so their namespaces agree.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

BEGINNING = 64
"""Tokens that two requests must share to be moved together, at least. Smaller pages, the smallest
of which is one token, are shared by everybody."""

Forms = Callable[[int | None], Sequence[Sequence[int]]]
"""The first so many tokens of a request, None for all, generated ones among them, in every way in
which a cache may hold them: a prompt with images has two (see `guard.heads`)."""
Key = tuple[int, int]
"""So many tokens, and a digest of them and of the request's own namespace."""
Outcome = Literal["namespace", "path", "covered", "limited"]
"""A new namespace for the beginning, or for the whole prompt only; the request ran in a namespace
that is left already; nothing, because the limit is reached."""


@dataclass(frozen=True)
class Limits:
    """`interval` and `life` in forward passes; life None: no end. `paths`: how often whole prompts
    become suspect in an interval, of one beginning. `suspicions`: at a time."""

    interval: int = 2_000
    paths: int = 4
    suspicions: int = 16_384
    life: int | None = 200_000


@dataclass(frozen=True)
class Path:
    """What a request computed or read: where its KV may be found.

    `number`: of the namespace in which it ran, 0 for its own.
    """

    beginnings: tuple[Key, ...]
    wholes: tuple[Key, ...]
    number: int


@dataclass
class _Suspicion:
    number: int
    since: int
    keys: tuple[Key, ...]
    below: tuple[Key, ...]  # for a whole prompt: its beginnings
    accused: set[int] = field(default_factory=set)


class Taint:
    """The suspicions of this scheduler. `page_size` in tokens; `now` counts forward passes.

    `origin` makes its namespaces differ from those of every other scheduler and start. It must,
    because a storage tier keeps pages by namespace and outlives the scheduler. `ended(reason)` is
    told of each suspicion that ends.
    """

    def __init__(
        self,
        page_size: int,
        origin: str = "0",
        now: Callable[[], int] = lambda: 0,
        limits: Limits | None = None,
        ended: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.page_size = page_size
        self.beginning = page_size * -(-BEGINNING // page_size)
        self.origin = origin
        self.namespaces = 0
        """Opened so far."""
        self._now = now
        self._limits = limits or Limits()
        self._ended = ended
        self._by_key: dict[Key, list[_Suspicion]] = {}
        self._by_name: dict[int, _Suspicion] = {}
        self._in_order: OrderedDict[int, _Suspicion] = OrderedDict()
        self._short: Counter[int] = Counter()
        """Lengths of suspect beginnings that are shorter than `beginning`."""
        self._wholes: dict[Key, Counter[int]] = {}
        """Lengths of suspect prompts, by their beginning."""
        self._opened: OrderedDict[Key, int] = OrderedDict()
        """When a beginning got its last namespace, within the interval; oldest first."""
        self._paths: Counter[Key] = Counter()
        """Whole prompts that became suspect since their beginning got its last namespace."""

    def __len__(self) -> int:
        """Suspicions that are not over."""
        return len(self._in_order)

    # -- requests -------------------------------------------------------------------------

    def number(self, own: str, forms: Forms) -> int:
        """Of the namespace for a request that begins like this; 0: no other than its own.

        `own`: the namespace that it came with.
        """
        self._expire()
        if not self._by_key:
            return 0
        return max((s.number for s in self._matching(own, forms)), default=0)

    def name(self, number: int) -> str | None:
        """What is added to a request's own namespace."""
        return f"kv-anomaly-{self.origin}-{number}" if number else None

    def path(
        self, own: str, forms: Forms, prompts: Sequence[Sequence[int]], number: int
    ) -> Path | None:
        """Of a request with these prompts that runs in the namespace `number`.

        A prompt that is shorter than a page is known by its first page, if it generated one. None
        for less than a page, which is never cached.
        """
        written = [tokens[: self.beginning] for tokens in prompts if len(tokens) >= self.page_size]
        beginnings = self._keys(own, written or forms(self.page_size))
        if not beginnings:
            return None
        wholes = self._keys(own, (tokens for tokens in prompts if len(tokens) > self.beginning))
        return Path(beginnings, wholes or beginnings, number)

    def _keys(self, own: str, prefixes: Iterable[Sequence[int]]) -> tuple[Key, ...]:
        """Of the whole pages in each of them."""
        lengths = ((tokens, len(tokens) // self.page_size * self.page_size) for tokens in prefixes)
        return tuple(
            dict.fromkeys(key for tokens, n in lengths if n for key in _keys(own, tokens, [n]))
        )

    def _matching(self, own: str, forms: Forms) -> Iterator[_Suspicion]:
        for tokens in forms(self.beginning):
            for length in (*self._short, self.beginning):
                if len(tokens) < length:
                    continue
                (key,) = _keys(own, tokens, [length])
                yield from self._by_key.get(key, ())
                if lengths := self._wholes.get(key):
                    for whole in forms(None):
                        for found in _keys(own, whole, sorted(lengths)):
                            yield from self._by_key.get(found, ())

    # -- accusations --------------------------------------------------------------------------

    def accuse(self, name: int, path: Path) -> Outcome:
        """The request that took this path was anomalous. `name`: by which it may be withdrawn."""
        now = self._now()
        self._expire()
        self._forget(now)
        if name in self._by_name:  # told again
            return "covered"
        for keys, below in ((path.beginnings, ()), (path.wholes, path.beginnings)):
            if self._is_left(name, keys, path.number):
                return "covered"
            if self._may_open(keys, below):
                self._open(name, now, keys, below)
                return "path" if below else "namespace"
        return "limited"

    def _may_open(self, keys: tuple[Key, ...], below: tuple[Key, ...]) -> bool:
        if not below:
            return not any(key in self._opened for key in keys)
        longer = not set(keys) <= set(below)
        return longer and all(self._paths[key] < self._limits.paths for key in below)

    def withdraw(self, name: int) -> bool:
        """That accusation was a false alarm. Whether a suspicion ends with it.

        A suspicion ends with the last accusation that rests on it. The requests that it moved find
        their old namespace again.
        """
        suspicion = self._by_name.pop(name, None)
        if suspicion is None:
            return False
        suspicion.accused.discard(name)
        if suspicion.accused:
            return False
        self._end(suspicion, "false_alarm")
        return True

    def _is_left(self, name: int, keys: Sequence[Key], number: int) -> bool:
        """Whether later requests with these keys run elsewhere; then the accusation rests on that.

        On the suspicion that opened the next namespace: without it they might come back.
        """
        resting = []
        for key in keys:
            newer = [s for s in self._by_key.get(key, ()) if s.number > number]
            if not newer:
                return False
            resting.append(min(newer, key=lambda s: s.number))
        suspicion = min(resting, key=lambda s: s.number)
        suspicion.accused.add(name)
        self._by_name[name] = suspicion
        return True

    def _open(self, name: int, now: int, keys: tuple[Key, ...], below: tuple[Key, ...]) -> None:
        if len(self._in_order) >= self._limits.suspicions:
            self._end(next(iter(self._in_order.values())), "dropped")
        self.namespaces += 1
        suspicion = _Suspicion(self.namespaces, now, keys, below, {name})
        self._in_order[suspicion.number] = suspicion
        self._by_name[name] = suspicion
        for key in keys:
            self._by_key.setdefault(key, []).append(suspicion)
            if not below:
                self._opened[key] = now
                self._opened.move_to_end(key)
                if key[0] < self.beginning:
                    self._short[key[0]] += 1
            for beginning in below:
                self._wholes.setdefault(beginning, Counter())[key[0]] += 1
        for beginning in below:
            self._paths[beginning] += 1

    def _end(self, suspicion: _Suspicion, reason: str) -> None:
        del self._in_order[suspicion.number]
        for name in suspicion.accused:
            self._by_name.pop(name, None)
        for key in suspicion.keys:
            self._by_key[key].remove(suspicion)
            if not self._by_key[key]:
                del self._by_key[key]
            if not suspicion.below and key[0] < self.beginning:
                self._short -= Counter([key[0]])
            for beginning in suspicion.below:
                self._wholes[beginning] -= Counter([key[0]])
                if not self._wholes[beginning]:
                    del self._wholes[beginning]
        self._ended(reason)

    def _expire(self) -> None:
        life = self._limits.life
        while life is not None and self._in_order:
            oldest = next(iter(self._in_order.values()))
            if self._now() - oldest.since < life:
                return
            self._end(oldest, "expired")

    def _forget(self, now: int) -> None:
        """Which beginnings got a namespace before this interval."""
        while self._opened:
            key, since = next(iter(self._opened.items()))
            if now - since < self._limits.interval:
                return
            del self._opened[key]
            self._paths.pop(key, None)


def _keys(own: str, tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[Key]:
    """Of the first so many tokens, for each length that `tokens` have; `lengths` ascend."""
    name = own.encode(errors="surrogatepass")
    digest = hashlib.blake2b(b"%d:%s" % (len(name), name), digest_size=8)
    begin = 0
    for length in lengths:
        if length > len(tokens):
            return
        digest.update(array("q", tokens[begin:length]).tobytes())
        begin = length
        yield length, int.from_bytes(digest.digest(), "big")
