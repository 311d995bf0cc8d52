"""Counter-based normal noise in plain PyTorch: Philox4x32-10 in int64 arithmetic that never overflows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit words; by halves of ``b``, so that int64 holds every term."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 (Salmon et al., SC 2011) of 32-bit words held in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def counter(block: Tensor, step: int, stream: int) -> Words:
    """The counter of block ``e >> 2``: its low and its high 32 bits, the step, the stream."""
    return block & _MASK, block >> 32, torch.full_like(block, step), torch.full_like(block, stream)


def _blocks(seeds: Tensor, step: int, count: int, stream: int) -> Tensor:
    """[B, ceil(count / 4), 4]: the four words of every block that holds an element."""
    block = torch.arange((count + 3) // 4, device=seeds.device).unsqueeze(0)
    key = (seeds & _MASK).unsqueeze(1), (seeds >> 32).unsqueeze(1)
    return torch.stack(philox4x32(counter(block, step, stream), key), dim=-1)


def philox_words(seeds: Tensor, step: int, shape: Sequence[int], stream: int) -> Tensor:
    count = math.prod(shape)
    return _blocks(seeds, step, count, stream).flatten(1)[:, :count].reshape(seeds.shape[0], *shape)


def philox_normal(seeds: Tensor, step: int, shape: Sequence[int], stream: int, channels_last: bool) -> Tensor:
    count = math.prod(shape)
    u = ((_blocks(seeds, step, count, stream) >> 8).float() + 0.5) * 2**-24
    radius = (-2 * u[..., 0::2].log()).sqrt()
    theta = (2 * math.pi) * u[..., 1::2]
    pairs = torch.stack((radius * theta.cos(), radius * theta.sin()), dim=-1)
    normal = pairs.flatten(1)[:, :count].reshape(seeds.shape[0], *shape)
    return normal.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
