"""Many threads that ask a server for images, take requests back, and ask for what there is not."""

import random
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ctm_fast.errors import UserError
from ctm_fast.serving import QueueFullError, Sampler, Server

SEEDS = 256
PLANS: tuple[dict[str, Any], ...] = ({"steps": 1}, {"steps": 2, "gamma": 0.5}, {"sigmas": [80.0, 1.0, 0.002]})
BAD: tuple[dict[str, Any], ...] = (
    {"seeds": [-1]},
    {"seeds": [0], "gamma": float("nan")},
    {"seeds": [0], "labels": 10},
    {"seeds": range(10**9)},
    {"seeds": [0], "sigmas": [1.0, 2.0]},
)
SIZES = (1, 1, 1, 2, 2, 3, 5, 8)


@dataclass
class Outcome:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    """answered, cancelled, refused (bad), retried (the queue was full) and failed."""
    seconds: list[float] = field(default_factory=list)
    """From the first attempt to submit to the answer, of each that was answered."""
    callbacks: list[int] = field(default_factory=list)
    """How often each future that was handed out was resolved."""

    def percentile(self, share: float) -> float:
        return statistics.quantiles(self.seconds, n=1000, method="inclusive")[round(share * 1000) - 1]


def truth(sampler: Sampler) -> list[torch.Tensor]:
    """uint8 images of all seeds, plan by plan."""
    made = [sampler(range(SEEDS), output="uint8", **plan) for plan in PLANS]
    assert all(isinstance(images, torch.Tensor) for images in made)
    return made  # type: ignore[return-value]


def storm(server: Server, expected: list[torch.Tensor], requests: int, threads: int, seed: int) -> Outcome:
    """``requests`` requests from ``threads`` threads: 1 in 100 is bad, 1 in 10 is cancelled at once."""
    outcome = Outcome()
    lock = threading.Lock()
    errors: list[BaseException] = []

    def client(index: int) -> None:
        draw = random.Random(1000 * seed + index)
        try:
            for _ in range(index, requests, threads):
                _one(server, expected, draw, outcome, lock)
        except BaseException as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(index,)) for index in range(threads)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    if errors:
        raise errors[0]
    return outcome


def _one(
    server: Server, expected: list[torch.Tensor], draw: random.Random, outcome: Outcome, lock: threading.Lock
) -> None:
    kind = draw.random()
    if kind < 0.01:
        with pytest.raises(UserError):
            server.submit(**draw.choice(BAD))
        with lock:
            outcome.counts["refused"] += 1
        return
    plan = draw.randrange(len(PLANS))
    count = draw.choice(SIZES)
    first = draw.randrange(SEEDS - count)
    begin = time.monotonic()
    while True:
        try:
            future = server.submit(range(first, first + count), output="uint8", **PLANS[plan])
            break
        except QueueFullError:
            with lock:
                outcome.counts["retried"] += 1
            time.sleep(0.02 * (1 + draw.random()))
    with lock:
        index = len(outcome.callbacks)
        outcome.callbacks.append(0)

    def resolved(_: Any) -> None:
        with lock:
            outcome.callbacks[index] += 1

    future.add_done_callback(resolved)
    if kind < 0.11:
        future.cancel()
    try:
        images = future.result(timeout=300)
    except CancelledError:
        with lock:
            outcome.counts["cancelled"] += 1
        return
    assert isinstance(images, torch.Tensor)
    right = images.shape[0] == count and (images.int() - expected[plan][first : first + count].int()).abs().max() <= 1
    with lock:
        outcome.counts["answered" if right else "failed"] += 1
        outcome.seconds.append(time.monotonic() - begin)
