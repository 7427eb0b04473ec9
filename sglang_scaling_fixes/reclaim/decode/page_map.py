"""Who has these pages? One look-up for each free, however many exposures are watched."""

from __future__ import annotations

import numpy as np


def every(flags: np.ndarray) -> bool:
    """Whether all are true. On few, `flags.all()` takes four times as long."""
    return bool(np.count_nonzero(flags) == len(flags))


class PageMap:
    """Page -> the leases that are watched for it. `pages`: how many the pool has.

    Nearly always a page has one: only pages of a shared prefix have more.
    """

    def __init__(self, pages: int) -> None:
        self._first: np.ndarray = np.zeros(pages + 1, np.int64)
        """For each page the number of a lease, 0: nobody watches it. The last one stands for all
        pages past it."""
        self._besides: dict[int, set[int]] = {}
        """Page -> numbers of the leases that are watched for it as well."""
        self._leases: dict[int, tuple[str, np.ndarray]] = {}
        self._numbers: dict[str, int] = {}
        self._last = 0

    def __contains__(self, lease: str) -> bool:
        return lease in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, lease: str, pages: np.ndarray) -> None:
        """Watch `pages`: unique, in order, int64."""
        self._last = number = self._last + 1
        self._numbers[lease] = number
        self._leases[number] = lease, pages
        self._make_room(pages)
        others = self._first[pages]
        if not np.count_nonzero(others):
            self._first[pages] = number
            return
        self._first[pages[others == 0]] = number
        for page in pages[others != 0].tolist():
            self._besides.setdefault(page, set()).add(number)

    def remove(self, lease: str) -> None:
        """Watch them no more on behalf of `lease`."""
        number = self._numbers.pop(lease)
        _, pages = self._leases.pop(number)
        if not self._besides:  # then all of them are its own
            self._first[pages] = 0
            return
        self._first[pages[self._first[pages] == number]] = 0
        for page in pages.tolist():
            if (numbers := self._besides.get(page)) is None:
                continue
            numbers.discard(number)
            if numbers and not self._first[page]:
                self._first[page] = numbers.pop()
            if not numbers:
                del self._besides[page]

    def find(self, pages: np.ndarray) -> dict[str, np.ndarray]:
        """The leases that are watched for some of `pages` (int64, any order), and for which."""
        numbers: np.ndarray = self._first.take(pages, mode="clip")
        first = int(numbers[0]) if len(numbers) else 0
        if not every(numbers == first):
            found = {n: pages[numbers == n] for n in np.unique(numbers).tolist() if n}
        elif first:
            found = {first: pages}
        else:
            return {}  # nor is anybody watched for them besides
        if self._besides:
            self._add_besides(pages, found)
        return {self._leases[number][0]: hit for number, hit in found.items()}

    def _add_besides(self, pages: np.ndarray, found: dict[int, np.ndarray]) -> None:
        besides: dict[int, list[int]] = {}
        for page in np.unique(pages).tolist():
            for number in self._besides.get(page, ()):
                besides.setdefault(number, []).append(page)
        for number, more in besides.items():
            also = np.array(more, np.int64)
            found[number] = np.concatenate([found[number], also]) if number in found else also

    def _make_room(self, pages: np.ndarray) -> None:
        past = len(self._first) - 1
        if len(pages) and pages[-1] >= past:
            more: np.ndarray = np.zeros(int(pages[-1]) + 2 - len(self._first), np.int64)
            self._first = np.concatenate([self._first, more])
