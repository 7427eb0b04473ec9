"""Decode's way to the prefill ranks: trailers on stock's messages, questions, sessions.

All of it leaves on stock's own sockets. Only there does the place of a question behind the
destinations mean something. Everything here runs on the scheduler thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import zmq
from msgspec import structs

from sglang_scaling_fixes.passthrough import Passthrough
from sglang_scaling_fixes.reclaim import messages
from sglang_scaling_fixes.reclaim.decode.records import Records
from sglang_scaling_fixes.reclaim.rules.exposure import Exposure
from sglang_scaling_fixes.reclaim.rules.pace import Pace
from sglang_scaling_fixes.reclaim.rules.types import Rank
from sglang_scaling_fixes.reclaim.stock_wire import SESSION_FRAME, is_room
from sglang_scaling_fixes.reclaim.transport import endpoint, send_now

logger = logging.getLogger(__name__)

REQUIRE_WAIT_S = 1.0
"""Seconds to wait for a prefill's first word under `--safe-reclaim-peer require`."""
REQUIRE_RETRY_S = 30.0
"""Seconds before a silent prefill is waited for again."""

Route = Callable[[], tuple[Any, Any]]
"""Stock's own look-up of its socket to a rank and that socket's lock (stock may replace them)."""


class Peers:
    """The prefill ranks that this decode rank has sent anything to."""

    def __init__(self, manager: Any, records: Records) -> None:
        self._manager = manager
        self._ledger = records.ledger
        self._lock = records.lock
        self._metrics = records.metrics
        self._stock_aborts = records.stock_aborts
        self._reply_to = endpoint(manager.local_ip, manager.rank_port)
        self._routes: dict[Rank, Route] = {}
        self._hello_on: dict[Rank, Any] = {}
        """Rank -> the socket its last Hello left on."""
        self._registrations: dict[Rank, list[bytes]] = {}
        """Rank -> stock's message that registered this decode's buffers there."""
        self._fenced_sessions: set[bytes] = set()
        self._uninformed: set[Rank] = set()
        """Ranks that do not know the present session yet: they get no destinations."""
        self._silent_until: dict[Rank, float] = {}
        self._instances: dict[str, set[Rank]] = {}
        """Prefill instance -> those of its ranks that destinations were sent to."""
        self._sending: tuple[Exposure, messages.Bind] | None = None
        """What stock is sending destinations for, and what goes with them but for the rank."""
        self.pace = Pace()
        self._refusals = Pace()
        """Nobody answers a Refusal, so they have a budget of their own."""

    def knows(self, rank: Rank) -> bool:
        """Whether anything was ever sent to `rank`."""
        return rank in self._routes

    # -- what leaves with stock's messages ----------------------------------------------

    def bind(
        self,
        exposure: Exposure,
        pages: int = 0,
        states: tuple[int, ...] | None = None,
        tokens: int | None = None,
        waited: float = 0.0,
    ) -> messages.Bind:
        """What is said of destinations of `exposure`, but for the rank they are for.

        `waited`: seconds since the request came to this decode.
        """
        return messages.Bind(
            self._reply_to,
            "",
            exposure.lease,
            exposure.attempt_id,
            pages=pages,
            states=states,
            tokens=tokens,
            waited=waited,
        )

    def unsayable(self, exposure: Exposure, bind: messages.Bind) -> str:
        """What prefill could not read of all that is ever said of `exposure`. Empty: nothing.

        It is asked before an address is sent: a question that prefill drops is never answered.
        """
        rank = max(exposure.writers, key=len, default="")
        abort = messages.Abort(self._reply_to, rank, exposure.room, exposure.lease)
        return messages.unsayable(structs.replace(bind, rank=rank)) or messages.unsayable(abort)

    def send_destinations(
        self, exposure: Exposure, bind: messages.Bind, send: Callable[[], Any]
    ) -> Any:
        """Let stock send the destinations of `exposure`, with `bind` behind them."""
        self._sending = exposure, bind
        try:
            return send()
        finally:
            self._sending = None

    def outgoing(
        self, rank: Rank, route: Route, frames: list[bytes], socket: Any = None
    ) -> list[bytes]:
        """Add our trailer to what stock sends to a prefill rank, under the socket's lock."""
        self._routes[rank] = route
        registers = frames[0] == b"None"  # stock's message about this decode's buffers
        names_session = registers or frames[0].isdigit()
        if names_session and frames[SESSION_FRAME] in self._fenced_sessions:
            # Stock's receiver of old releases keeps the session it was made under.
            frames[SESSION_FRAME] = self._session()
        if registers:
            self._registrations[rank] = frames
            return self._with_hello(rank, frames, socket)
        if frames[0] == b"ABORT":
            self._stock_abort(rank, frames)
            return frames
        if self._sending is None or rank not in self._sending[0].writers:
            return frames
        exposure, bind = self._sending
        with self._lock:
            self._ledger.sent(exposure, rank, after_hello=self._hello_on.get(rank) is socket)
            expects = exposure.writers[rank].incarnation
        return messages.attach_trailer(frames, structs.replace(bind, rank=rank, expects=expects))

    def left(self, rank: Rank, frames: list[bytes]) -> None:
        """Stock has sent it: `rank` knows the session of a registration."""
        if frames[0] == b"None":
            self._uninformed.discard(rank)

    def _with_hello(self, rank: Rank, frames: list[bytes], socket: Any) -> list[bytes]:
        """Stock's registration with a numbered Hello: who serves `rank` is asked anew."""
        self._hello_on[rank] = socket
        with self._lock:
            seq = self._ledger.hello(rank)
        return messages.attach_trailer(frames, messages.Hello(self._reply_to, rank, seq=seq))

    def _stock_abort(self, rank: Rank, frames: list[bytes]) -> None:
        if self._stock_aborts is None or not is_room(frames[1]):
            return
        room = int(frames[1])
        with self._lock:
            exposed = bool(self._ledger.of_room(room))
        if exposed:
            self._stock_aborts.sent(room, rank, frames)
        else:
            self._stock_aborts.unexposed(room)

    def serve(self, prefill: str, ranks: Iterable[Rank]) -> None:
        """Requests of this prefill instance are served by these ranks."""
        self._instances.setdefault(prefill, set()).update(ranks)

    def send_refusal(self, prefill: str, room: int) -> None:
        """Tell this prefill instance that a request is not taken: its half need not wait.

        Any rank that fails the room ends the request on all of them.
        """
        now = time.monotonic()
        for rank in sorted(self._instances.get(prefill, ())):
            refusal = messages.Refusal(rank, room)
            if messages.unsayable(refusal):
                continue  # no destinations leave for such a room either
            if rank in self._ledger.peers and self._refusals.may(rank, now):
                self._send(rank, [messages.encode(refusal)])

    def heard(self, rank: Rank) -> None:
        """`rank` said something: it empties its queue."""
        self.pace.heard(rank)
        self._refusals.heard(rank)

    # -- questions -----------------------------------------------------------------------

    def send_aborts(self, ranks: Iterable[Rank] | None = None) -> None:
        """Send the questions that are due, to `ranks` or to all; to all also stock's own ABORTs
        again.

        A rank that says nothing is asked rarely: its queue, which is stock's as well, must not
        fill up.
        """
        now = time.monotonic()
        if ranks is not None:
            ranks = [rank for rank in ranks if not self.pace.rests(rank, now)]
            if not ranks:
                return  # in a storm nearly always
        with self._lock:
            asks = self._ledger.tick(now, ranks, self.pace.may)
        for ask in asks:
            message = messages.Abort(self._reply_to, ask.rank, ask.room, ask.lease)
            if not self._send(ask.rank, [messages.encode(message)]):
                with self._lock:
                    self._ledger.unsent(ask)
                continue
            self._metrics.inc("aborts_sent")
            if ask.again:
                self._metrics.inc("aborts_resent")
        if ranks is None and self._stock_aborts is not None:
            for rank, frames in self._stock_aborts.due(now):
                self._send(rank, frames)

    def _send(self, rank: Rank, frames: list[bytes], *, registers: bool = False) -> bool:
        """To a prefill rank on stock's socket, without blocking. False: ask again later."""
        try:
            socket, lock = self._routes[rank]()
        except zmq.ZMQError as error:  # stock could not make a socket
            logger.debug("safe-reclaim: no socket to %s: %s", rank, error)
            return False
        with lock:
            sent = self._with_hello(rank, frames, socket) if registers else frames
            return send_now(socket, sent)

    # -- who runs the plugin ---------------------------------------------------------------

    def without_plugin(self, ranks: Iterable[Rank]) -> list[Rank]:
        """Those of `ranks` that have not said that they run safe reclaim."""
        return [rank for rank in ranks if rank not in self._ledger.peers]

    def all_run_plugin(self, ranks: list[Rank]) -> bool:
        """Wait a moment for a first word, once in a while per rank: this is the scheduler."""
        now = time.monotonic()
        deadline = now + REQUIRE_WAIT_S
        while silent := self.without_plugin(ranks):
            known_silent = all(self._silent_until.get(rank, 0.0) > now for rank in silent)
            if known_silent or time.monotonic() >= deadline:
                self._silent_until.update(dict.fromkeys(silent, now + REQUIRE_RETRY_S))
                return False
            time.sleep(0.005)
        return True

    # -- sessions ----------------------------------------------------------------------------

    def end_session(self, session: str) -> None:
        """A fence ended it: what stock still sends under it leaves under the present one."""
        self._fenced_sessions.add(session.encode("ascii"))

    def register_everywhere(self) -> None:
        """Register at every known rank under the present session."""
        self._uninformed.update(self._registrations)
        for rank in self._registrations:
            self._register(rank)

    def uninformed(self, addressed: Iterable[Rank]) -> list[Rank]:
        """Those of the addressed ranks that take no registration even now."""
        if not self._uninformed:
            return []
        return [rank for rank in self._uninformed & set(addressed) if not self._register(rank)]

    def _register(self, rank: Rank) -> bool:
        """Register at `rank` again under the present session. False: its queue is full."""
        frames = self._registrations[rank]
        frames[SESSION_FRAME] = self._session()
        sent = self._send(rank, frames, registers=True)
        if sent:
            self._uninformed.discard(rank)
        return sent

    def _session(self) -> bytes:
        return str(self._manager.get_session_id()).encode("ascii")


class OutgoingSocket(Passthrough):
    """The socket to one prefill rank: stock's messages leave with our trailer."""

    def __init__(self, stock: Any, rank: Rank, route: Route, peers: Peers) -> None:
        super().__init__(stock)
        self._rank = rank
        self._route = route
        self._peers = peers

    def send_multipart(self, frames: list[bytes], *args: Any, **kwargs: Any) -> Any:
        frames = self._peers.outgoing(self._rank, self._route, list(frames), self._stock)
        result = self._stock.send_multipart(frames, *args, **kwargs)
        self._peers.left(self._rank, frames)
        return result


def rank_of(bootstrap_info: dict[str, Any]) -> Rank:
    """How this decode addresses a prefill rank: `"ip:port"`."""
    return f"{bootstrap_info['rank_ip']}:{bootstrap_info['rank_port']}"
