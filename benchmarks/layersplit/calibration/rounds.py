"""#29930's conversation: its hit rates give the working set, its prefill speed the GPUs; its waits
are then predicted.

Its split pool found 0, 1/2 and 2/3: what an endless pool finds where each round of a conversation
adds as much as the one before. How many clients there were and how long their turns is not said.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.layersplit.calibration.gain import BANDWIDTH, OUTPUT_TOKEN, POOL, TRANSFER
from benchmarks.layersplit.calibration.published import ROUNDS
from sglang_scaling_fixes.layersplit.planner.traffic import Speed, forwards
from sglang_scaling_fixes.layersplit.simulator import deployment
from sglang_scaling_fixes.layersplit.simulator.cost import Rates
from sglang_scaling_fixes.layersplit.simulator.deployment import Deployment
from sglang_scaling_fixes.layersplit.simulator.engine import Replay
from sglang_scaling_fixes.layersplit.simulator.records import Request

TURNS = (4096, 8192, 16_384, 32_768)
"""Tokens that a round adds: none is published, so each is tried."""
WORKING_SETS = tuple(range(220_000, 420_001, 20_000))
"""Tokens of all clients' first turns."""
SEEDS = (1, 2, 3)
APART = 1e5
"""Seconds between rounds: each is over before the next begins."""
BLOCK = 512


@dataclass(frozen=True)
class Played:
    """Means over the seeds. `hits`: of each round. `mean` and `worst`: TTFT in s, over the requests
    of the last round: which of them #29930 prints, it does not say."""

    hits: tuple[float, ...]
    mean: float
    worst: float


@dataclass(frozen=True)
class Fitted:
    turn: int
    clients: int
    tflops: float
    unsplit: Played
    upstream: Played
    ours: Played
    error: float
    """Root of the mean square of the unsplit pool's hits, less the published ones."""


def tflops(turn: int) -> float:
    """Of each GPU, with which a prompt of `turn` tokens takes as long as published."""
    unit = Speed(BANDWIDTH, 1e12)
    seconds = sum(
        layer.compute
        for forward in forwards(turn, 0.0, POOL.chunk)
        for layer in forward.layers(POOL, unit)
    )
    return seconds / (turn / ROUNDS.prefill_tokens_s)


def conversation(clients: int, turn: int, seed: int) -> list[Request]:
    """All clients at once, in each round in an order of its own."""
    order, found = random.Random(seed), []
    for number in range(len(ROUNDS.hits_unsplit)):
        prompt = (number + 1) * turn
        for client in order.sample(range(clients), clients):
            blocks = tuple((client, n) for n in range(-(-prompt // BLOCK)))
            found.append(Request(0, number, number * APART, 0.0, prompt, 1, blocks, BLOCK))
    return found


def play(clients: int, turn: int, one: Deployment) -> Played:
    rates = Rates(Speed(BANDWIDTH, 1e12 * tflops(turn)), 1.0, TRANSFER, OUTPUT_TOKEN)
    rounds = range(len(ROUNDS.hits_unsplit))
    hits, mean, worst = [0.0] * len(rounds), 0.0, 0.0
    for seed in SEEDS:
        answers = Replay(conversation(clients, turn, seed), POOL, one, rates).run().answers
        for number in rounds:
            of_round = [answer for answer in answers if answer.request.session == number]
            found = sum(answer.hit for answer in of_round)
            hits[number] += found / sum(answer.request.prompt for answer in of_round) / len(SEEDS)
            if number == rounds[-1]:
                waits = [answer.ended - answer.arrived for answer in of_round]
                mean += sum(waits) / len(waits) / len(SEEDS)
                worst += max(waits) / len(SEEDS)
    return Played(tuple(hits), mean, worst)


def fitted(turn: int) -> Fitted:
    """The number of clients that comes nearest to the unsplit pool's published hits."""
    unsplit, upstream, ours = deployment.of(POOL, 0)
    tried = []
    for clients in sorted({round(tokens / turn) for tokens in WORKING_SETS}):
        played = play(clients, turn, unsplit)
        pairs = zip(played.hits, ROUNDS.hits_unsplit, strict=True)
        squares = [(found - published) ** 2 for found, published in pairs]
        tried.append(((sum(squares) / len(squares)) ** 0.5, clients, played))
    error, clients, played = min(tried, key=lambda one: one[0])
    return Fitted(
        turn,
        clients,
        tflops(turn),
        played,
        play(clients, turn, upstream),
        play(clients, turn, ours),
        error,
    )
