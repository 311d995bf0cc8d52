"""The noise in Python integers and float64, after its definition: the truth for philox_normal and gamma_step."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

Words = tuple[int, int, int, int]

BOUND = 2e-6
"""Largest absolute error of a normal."""


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 % 2**32,
            product0 >> 32 ^ c3 ^ k1,
            product0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def words(seed: int, step: int, count: int, stream: int) -> list[int]:
    """The words of a sample's first ``count`` elements."""
    key = seed % 2**32, seed >> 32
    blocks = (philox4x32((i % 2**32, i >> 32, step, stream), key) for i in range(-(-count // 4)))
    return list(itertools.chain.from_iterable(blocks))[:count]


def exact_words(seeds: Tensor, step: int, shape: tuple[int, ...], stream: int) -> Tensor:
    """[B, *shape] int64."""
    count = math.prod(shape)
    found = [words(seed, step, count, stream) for seed in seeds.tolist()]
    return torch.tensor(found, dtype=torch.int64).reshape(len(seeds), *shape)


def exact_normal(seeds: Tensor, step: int, shape: tuple[int, ...], stream: int) -> Tensor:
    """[B, *shape] float64: u and theta rounded to float32, as the definition says, and nothing else."""
    count = math.prod(shape)
    whole = -(-count // 4) * 4
    drawn = np.array([words(seed, step, whole, stream) for seed in seeds.tolist()], np.int64).reshape(len(seeds), whole)
    u = ((drawn >> 8).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
    radius = np.sqrt(-2 * np.log(u[:, 0::2].astype(np.float64)))
    theta = (np.float32(2 * math.pi) * u[:, 1::2]).astype(np.float64)
    pairs = np.stack((radius * np.cos(theta), radius * np.sin(theta)), axis=-1)
    return torch.from_numpy(pairs).flatten(1)[:, :count].reshape(len(seeds), *shape)


def random_seeds(batch: int, generator: torch.Generator) -> Tensor:
    """[batch] int64 from 0 to 2^63 - 1, with the ends, and a seed of either word alone, among the first."""
    seeds = torch.randint(2**63 - 1, (batch,), generator=generator)
    first = torch.tensor([2**63 - 1, 0, 2**32, 2**32 - 1])[:batch]
    seeds[: len(first)] = first
    return seeds
