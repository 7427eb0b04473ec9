"""Suspect prefixes: KV of an anomalous request that no later request may read.

A request reads the KV of its tokens' path in the prefix cache, from the first page on. Any page of
the path may be the corrupt one. All KV below a corrupt page was computed from it. So the whole path
is suspect, and so is everything below its first page:

    namespace "a":      page 1 -- page 2 -- page 3      aborted: all of it is suspect, from page 1
                               \\- page 4               its neighbour read page 1 too
    namespace "a|kv-anomaly-1":    page 1 -- ...        later requests begin here, empty

Later requests that begin with the same page get another namespace: SGLang's `extra_key`, across
which its caches share nothing. So these requests do not match the old path, and their own KV is not
merged into it. No later request reads the old path, and the cache evicts it as the least recently
used. Requests that read it already go on; the guard watches them too.

The path is not evicted at once, because nodes in use cannot be evicted, and because each cache of
each release would need a way of its own. No I/O. All ranks learn of the same anomalies in the same
order, so their namespaces agree.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence

LIMIT = 4096
"""Suspect beginnings remembered one by one. At the limit, everything cached becomes suspect."""
PAGES = tuple(2**power for power in range(11))
"""Page sizes in tokens for which a notification describes a prompt's first page."""


def digest(tokens: Sequence[int]) -> int:
    """63 bits that identify a beginning, the same in every process."""
    raw = hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 1


def beginnings(tokens: Sequence[int]) -> dict[int, int]:
    """The digest of the first page, by page size, for all `PAGES` that `tokens` fill."""
    return {page: digest(tokens[:page]) for page in PAGES if len(tokens) >= page}


class Taint:
    """The suspect beginnings that this scheduler knows of. `page_size` in tokens.

    `origin` makes its namespaces differ from those of every other scheduler and start. It must,
    because a storage tier keeps pages by namespace and outlives the scheduler.
    """

    def __init__(self, page_size: int, origin: str = "0", limit: int = LIMIT) -> None:
        self.page_size = page_size
        self._origin = origin
        self._limit = limit
        self._count = 0
        self._everything = 0
        self._namespaces: dict[int, int] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """A request with this prompt was anomalous. Less than one page is never cached."""
        if len(tokens) >= self.page_size:
            self.add_digest(digest(tokens[: self.page_size]))

    def add_beginnings(self, known: Mapping[int, int]) -> None:
        """The same for the first pages that `beginnings` describes on another server."""
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
        """The suffix for the namespace of a request that begins like this; None: no suffix.

        `prompts`: all forms of one prompt; a prompt with images has two (see `guard.heads`).
        """
        if not self._count:
            return None
        pages = [tokens[: self.page_size] for tokens in prompts if len(tokens) >= self.page_size]
        numbers = [self._namespaces.get(digest(page), self._everything) for page in pages]
        return f"kv-anomaly-{self._origin}-{max(numbers)}" if any(numbers) else None
