"""What went over the link, and when."""

from __future__ import annotations

import threading
import time

from sglang_scaling_fixes.lab.servers.link import Link

SAMPLE_S = 0.05


class Traffic:
    """Samples the link's byte counter, in a thread, from entry on."""

    def __init__(self, way: Link) -> None:
        self._link = way
        self._base = way.sent_bytes()
        self._samples = [(time.time(), 0)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._samples.append((time.time(), self.sent()))

    def sent(self) -> int:
        """Bytes sent since entry."""
        return self._link.sent_bytes() - self._base

    def moved_since(self, sent: int, within_s: float) -> bool:
        """Whether more than `sent` has been sent, waiting a while for it."""
        deadline = time.monotonic() + within_s
        while self.sent() <= sent:
            if time.monotonic() > deadline:
                return False
            time.sleep(SAMPLE_S)
        return True

    def sent_after(self, moment: float) -> int:
        """Bytes sent after `moment` (seconds since the epoch) as far as sampled."""
        before = max((n for t, n in self._samples if t <= moment), default=0)
        return self._samples[-1][1] - before

    def quiet_s(self, noise_bytes: int = 20_000) -> float:
        """For how long nothing but chatter (heartbeats) has been sent."""
        now, total = self._samples[-1]
        since = next((t for t, n in reversed(self._samples) if total - n > noise_bytes), None)
        return now - (self._samples[0][0] if since is None else since)
