"""Suspect prefixes: KV of an anomalous request that no later request may read.

The KV a request reads belongs to the path of its tokens in the prefix cache, from the first page
on. Any page of the path may be the corrupt one, and all KV below a corrupt page was computed from
it. So the whole path is suspect, with everything that hangs on its first page:

    namespace "a":      page 1 -- page 2 -- page 3      aborted: all of it is suspect, from page 1
                               \\- page 4               its neighbour read page 1 too
    namespace "a|kv-anomaly-1":    page 1 -- ...        whoever comes later begins here, empty

Requests that begin with the same page get another namespace (SGLang's `extra_key`, which its
caches never share between), so that they neither match the old path nor are merged into it when
their own KV is inserted. Nobody reads the old path again; the cache evicts it as the least
recently used. Requests already reading it are left alone: the guard watches them too.

Why not evict: nodes in use cannot be, and every cache of every release would need a way of its own.
Sans-IO; the same on all ranks, which are told of the same anomalies in the same order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence

LIMIT = 4096
"""Suspect beginnings remembered one by one; past it everything cached is suspect, once."""
PAGES = tuple(2**power for power in range(11))
"""Page sizes (tokens) for which a beginning is described to a server of another page size."""


def digest(tokens: Sequence[int]) -> int:
    """A beginning's identity, 63 bits: the same in every process."""
    raw = hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 1


def beginnings(tokens: Sequence[int]) -> dict[int, int]:
    """The digest of the first page, by page size, for all `PAGES` that `tokens` fill."""
    return {page: digest(tokens[:page]) for page in PAGES if len(tokens) >= page}


class Taint:
    """The suspect beginnings that this scheduler knows of. `page_size` in tokens.

    `origin` makes its namespaces unlike those of any other scheduler or start: a storage tier that
    outlives this one keeps pages by namespace.
    """

    def __init__(self, page_size: int, origin: str = "0", limit: int = LIMIT) -> None:
        self.page_size = page_size
        self._origin = origin
        self._limit = limit
        self._count = 0
        self._everything = 0
        self._namespaces: dict[int, int] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """A request with this prompt was anomalous. Less than a page is never cached."""
        if len(tokens) >= self.page_size:
            self.add_digest(digest(tokens[: self.page_size]))

    def add_beginnings(self, known: Mapping[int, int]) -> None:
        """The same, as `beginnings` on another server describes it."""
        if self.page_size in known:
            self.add_digest(known[self.page_size])
        elif self.page_size not in PAGES:
            self._start_over()  # not described for this page size: be safe

    def add_digest(self, beginning: int) -> None:
        if beginning not in self._namespaces and len(self._namespaces) >= self._limit:
            self._start_over()
            return
        self._count += 1
        self._namespaces[beginning] = self._count

    def _start_over(self) -> None:
        self._count += 1
        self._everything = self._count
        self._namespaces.clear()

    def __len__(self) -> int:
        """Namespaces opened so far."""
        return self._count

    def namespace(self, *prompts: Sequence[int]) -> str | None:
        """What a request whose tokens begin like this adds to its own namespace; None: nothing.

        Several, where one request's tokens are written in several ways (placeholders of images).
        """
        if not self._count:
            return None
        pages = [tokens[: self.page_size] for tokens in prompts if len(tokens) >= self.page_size]
        numbers = [self._namespaces.get(digest(page), self._everything) for page in pages]
        return f"kv-anomaly-{self._origin}-{max(numbers)}" if any(numbers) else None
