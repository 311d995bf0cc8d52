"""Counter-based normal noise: a sample's noise depends on its seed, the step and the stream, and on nothing else."""

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from ctm_fast.ops._checks import check
from ctm_fast.ops._library import define, kernel

_WORD = 2**32


class Stream(enum.IntEnum):
    """What noise is for: the last word of the counter, so that no two uses of a seed draw the same numbers."""

    X_T = 0
    RENOISE = 1
    CHURN = 2
    LANGEVIN = 3
    TRAIN = 4
    DSM = 5
    DEQUANTISE = 6
    PROBE = 7
    BOUND = 8
    LABEL = 9


def philox_normal(
    seeds: Tensor,
    step: int,
    shape: Sequence[int],
    *,
    stream: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Draws of N(0, I), the same on every device and backend to 2e-6, in any batch, order and memory format.

        r = Philox4x32-10(key = (low, high) word of the seed,
                          counter = (low, high) word of e >> 2, step, stream)      Salmon et al., SC 2011
        u = ((r >> 8) + 0.5) 2^-24                                                 one of each of the four words
        n_0, n_1 = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1)                            Box-Muller; n_2, n_3 from u_2, u_3

    Element e of a sample, counted in the order of ``shape`` whatever the memory format, is n_(e & 3) of block e >> 2.
    Every operation on u is rounded to float32, the product (2 pi) u_1 among them.

    Args:
        seeds: [B] int64, each 0 to 2^63 - 1 (not checked: reading a value would synchronise).
        step: 0 to 2^32 - 1, the step of the sampler or of training.
        shape: of one sample, such as (C, H, W).
        stream: what the noise is for, a :class:`Stream` or another number from 0 to 2^32 - 1.
        memory_format: torch.contiguous_format, or torch.channels_last for a shape (C, H, W).

    Returns:
        [B, *shape] float32; no gradient flows.

    Raises:
        TypeError: a dtype, an argument that is not an integer, ValueError: a shape or range; both name the argument.
    """
    check_seeds(seeds, step)
    shape = _check_shape(shape)
    _check_word("stream", stream)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected torch.contiguous_format or torch.channels_last, got {memory_format}")
    channels_last = memory_format == torch.channels_last
    if channels_last and len(shape) != 3:
        raise ValueError(f"shape: expected (C, H, W) with torch.channels_last, got {list(shape)}")
    return kernel("philox_normal", seeds)(seeds.contiguous(), step, shape, int(stream), channels_last)


def philox_words(seeds: Tensor, step: int, shape: Sequence[int], *, stream: int) -> Tensor:
    """The 32-bit words that :func:`philox_normal` is made of, identical on every device and backend.

    Args, errors: as for :func:`philox_normal`.

    Returns:
        [B, *shape] int64, each 0 to 2^32 - 1: word e & 3 of block e >> 2 at element e.
    """
    check_seeds(seeds, step)
    shape = _check_shape(shape)
    _check_word("stream", stream)
    return kernel("philox_words", seeds)(seeds.contiguous(), step, shape, int(stream))


def check_seeds(seeds: Tensor, step: int, *, like: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless ``seeds`` is int64 [B] and ``step`` a 32-bit word.

    ``like`` is the image batch that the noise is for, which gives B and the device.
    """
    check("seeds", seeds, like=like, shape=like.shape[:1] if like is not None else None, dtypes=(torch.int64,))
    if seeds.dim() != 1:
        raise ValueError(f"seeds: expected shape [B], got {list(seeds.shape)}")
    _check_word("step", step)


def _check_word(name: str, value: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 0 <= value < _WORD:
        raise ValueError(f"{name}: expected 0 to {_WORD - 1}, got {value}")


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shape: expected a sequence of ints, got {shape!r}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected sizes of 0 or more, got {list(shape)}")
    return tuple(shape)


def _fake_words(seeds: Tensor, step: int, shape: Sequence[int], stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape))


def _fake_normal(seeds: Tensor, step: int, shape: Sequence[int], stream: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((seeds.shape[0], *shape), dtype=torch.float32, device=seeds.device, memory_format=layout)


define("philox_normal", "philox_words", fake=_fake_words)
define("philox_normal", "philox_normal", fake=_fake_normal)
