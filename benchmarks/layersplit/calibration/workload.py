"""Sessions of a trace, scaled to a context's length and kept up by so many at once."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from sglang_scaling_fixes.layersplit.simulator.records import Request, Trace


class Sessions:
    """Of a trace. Ids that two sessions have are a beginning that all share, and stay as they are
    however often a session is played; the others are a new conversation each time."""

    def __init__(self, trace: Trace) -> None:
        by_name: defaultdict[Hashable, list[Request]] = defaultdict(list)
        for request in trace:
            by_name[request.session].append(request)
        self._sessions = list(by_name.values())
        self._mean = sum(request.prompt for request in trace) / len(trace)
        owners: Counter[Hashable] = Counter()
        for session in self._sessions:
            owners.update({block for request in session for block in request.blocks})
        self._common = {block for block, count in owners.items() if count > 1}

    def kept_up(
        self, context: int, live: int, turns: int, first: int = 0, *, amid: bool = True
    ) -> Sequence[Request]:
        """`live` users, each with `turns` requests, one session after the other; user n begins with
        session `first` + n of the trace, round and round. `amid`: user n begins with turn n of it,
        so that conversations of all lengths are under way from the start.

        `context`: tokens of a prompt, on average over the trace. Every prompt is longer or shorter
        by the same factor, and so are the blocks; answers and pauses stay as they are.
        """
        found: list[Request] = []
        for user in range(live):
            made, playing = 0, first + user
            while made < turns:
                again, which = divmod(playing, len(self._sessions))
                session = self._sessions[which]
                skipped = user % len(session) if amid and not made else 0
                for request in session[skipped : skipped + turns - made]:
                    found.append(self._scaled(request, context, user, again, made == 0))
                    made += 1
                playing += live
        return found

    def _scaled(
        self, request: Request, context: int, user: int, again: int, begins: bool
    ) -> Request:
        block = max(round(request.block * context / self._mean), 1)
        prompt = math.ceil(request.prompt * block / request.block)
        blocks = tuple(
            one if one in self._common else (one, again)
            for one in request.blocks[: math.ceil(prompt / block)]
        )
        arrival = 0.0 if begins else None
        return Request(
            request.line, user, arrival, request.delay, prompt, request.output, blocks, block
        )
