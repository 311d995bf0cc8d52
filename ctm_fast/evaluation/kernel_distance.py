"""The kernel distance (KID): a squared maximum mean discrepancy that is unbiased at any number of samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctm_fast.data.order import shuffled
from ctm_fast.evaluation.feature_table import Rows

DEGREE = 3
_LEAST_BLOCKS = 10


@dataclass(frozen=True)
class KernelDistance:
    """``value``, which may be negative, the ``standard_error`` of it, and the blocks that it is the mean of."""

    value: float
    standard_error: float
    blocks: int
    block_size: int


def kernel_distance(
    real: Tensor | Rows, generated: Tensor | Rows, *, block_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """MMD^2 between two sets of features under the kernel (x . y / D + 1)^3 (arXiv 1801.01401, Sec. 4).

    Each set is shuffled, by ``seed`` and its size alone, and cut into disjoint blocks; a pair of blocks gives the
    unbiased estimate (Gretton et al. 2012, Eq. 3). The value is their mean, and as no two pairs share a sample, their
    spread gives its standard error. What is left behind the last whole block of the smaller set is not used.

    Args:
        real, generated: [n, D], [m, D], in the order of the samples' index, at least 20 each.
        block_size: at most; a tenth of the smaller set where that is less, so that there are ten blocks.

    Raises:
        ValueError: shapes that do not fit, or too few samples.
    """
    fits = real.dim() == generated.dim() == 2 and real.shape[1] == generated.shape[1]
    n = min(len(real), len(generated))
    if not fits or n < 2 * _LEAST_BLOCKS or block_size < 2:
        raise ValueError(
            f"features: expected [n, D] and [m, D] of {2 * _LEAST_BLOCKS} samples or more in blocks of 2 or more, "
            f"got {list(real.shape)} and {list(generated.shape)} in blocks of {block_size}"
        )
    size = min(block_size, n // _LEAST_BLOCKS)
    estimates = [
        _unbiased(real[x.to(real.device)].double(), generated[y.to(generated.device)].double())
        for x, y in zip(_blocks(len(real), size, seed), _blocks(len(generated), size, seed + 1), strict=False)
    ]
    values = torch.stack(estimates)
    error = values.std() / len(values) ** 0.5
    return KernelDistance(float(values.mean()), float(error), len(values), size)


def _blocks(n: int, size: int, seed: int) -> list[Tensor]:
    """Whole blocks of a shuffled order."""
    order = torch.from_numpy(shuffled(n, seed))
    return [order[start : start + size] for start in range(0, n - size + 1, size)]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(DEGREE)


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Between x, y [m, D]: means of the kernel over pairs, a sample with itself being no pair."""
    m = len(x)
    within = [_off_diagonal_sum(_kernel(z, z)) / (m * (m - 1)) for z in (x, y)]
    return within[0] + within[1] - 2 * _kernel(x, y).mean()


def _off_diagonal_sum(kernel: Tensor) -> Tensor:
    return kernel.sum() - kernel.trace()
