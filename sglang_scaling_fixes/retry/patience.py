"""How long a task waits for the next event of an answer. One timer, however many events."""

from __future__ import annotations

import asyncio


class OutOfPatience(Exception):
    """Nothing came in time."""


class Patience:
    """As `asyncio.timeout`, in a block of one task: OutOfPatience once `wait` was too long ago.

    `wait` costs no more than a look at the clock. So it can be called for every event. The timer
    looks every second whether the time was moved.
    """

    LOOK_S = 1.0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._until = float("inf")
        self._left = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def __enter__(self) -> None:
        self._before = self._task.cancelling()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # Who else has cancelled the task meanwhile wants it to end.
        alone = self._over and self._task.uncancel() <= self._before
        if alone and kind is asyncio.CancelledError:
            raise OutOfPatience from None

    def wait(self, seconds: float) -> None:
        """From now on, so long."""
        now = self._loop.time()
        self._until = now + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(min(self._until, now + self.LOOK_S), self._look)

    def pause(self) -> None:
        """Until `resume` time does not count."""
        self._left = self._until - self._loop.time()
        self._until = float("inf")

    def resume(self) -> None:
        self._until = self._loop.time() + self._left

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._until:
            self._over = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(min(self._until, now + self.LOOK_S), self._look)
