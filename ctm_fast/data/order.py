"""The order in which training visits its samples, the same for a run that was resumed."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order [n], int64, read-only, in which epoch number ``epoch`` visits ``n`` samples.

    The ranks of n raw 64-bit words of Philox with key (seed, 2^63 + epoch), which no generator of
    ``diffusion/draws.py`` has. NumPy keeps raw words the same from release to release, and its ``permutation`` not, so
    that an old run resumes under a new NumPy.
    """
    words = np.random.Philox(key=np.array([seed, 2**63 + epoch], dtype=np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
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
