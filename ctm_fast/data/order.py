"""Orders and choices of samples that a seed decides, the same under any NumPy, and for a run that was resumed."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def shuffled(n: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """0 to n - 1 in an order that ``key`` decides, int64: the ranks of n raw 64-bit words of Philox.

    NumPy keeps raw words the same from release to release, and its ``permutation`` not, so that an old run resumes
    under a new NumPy.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.int64)


def some(n: int, most: int, seed: int) -> Tensor:
    """``most`` of the indices 0 to n - 1, or all, in ascending order: int64, on the CPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order [n], int64, read-only, in which epoch number ``epoch`` visits ``n`` samples.

    That of :func:`shuffled` with key (seed, 2^63 + epoch), which no generator of ``diffusion/draws.py`` has.
    """
    order = shuffled(n, np.array([seed, 2**63 + epoch], dtype=np.uint64))
    order.setflags(write=False)
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices [batch_size] int64 of the samples of training step ``step``, counted from 0.

    One endless stream of shuffled epochs is cut into batches, so that a batch may straddle epochs. It is a function
    of its arguments alone: a run resumed at a step continues at the very sample.

    Raises ValueError for n or batch_size below 1, or a negative step.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("step", step, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        first = epoch * n
        pieces.append(epoch_order(n, seed, epoch)[max(start - first, 0) : stop - first])
    return torch.from_numpy(np.concatenate(pieces))
