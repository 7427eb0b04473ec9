"""How long a task waits for the next event of an answer. One timer, however many events."""

from __future__ import annotations

import asyncio


class Patience:
    """Cancels its task once `until` has passed; `over` then says that it was this.

    `wait` costs no more than a look at the clock. So it can be called for every event. The timer
    looks every second whether the time was moved.
    """

    LOOK_S = 1.0

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._before = task.cancelling()
        self._until = float("inf")
        self._left = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.over = False
        self._ended = False

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

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self.over:
            self.over = self._task.uncancel() <= self._before

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._until:
            self.over = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(min(self._until, now + self.LOOK_S), self._look)
