"""Jumps of a batch of which some rows stay where they are: G(x, t, t) = x needs no network.

Which rows do is known on the host, where levels are drawn. At N = 18 points a random s is sigma_min, where the outer
jump is the identity, or u, where the target's inner one is, for about half of a batch each.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Jump = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def jump_rows(
    jump: Jump, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, moving: NDArray[np.bool_], *, bucket: int = 1
) -> Tensor:
    """G(x, t, s) [B, C, H, W], ``jump`` being asked for the rows alone that ``moving`` [B] has, on the host.

    The other rows must have s = t. Gradients go through both kinds.

    Args:
        bucket: rows asked for are made a multiple of this, by repeating one, so that ``jump`` sees few sizes.
    """
    rows = np.flatnonzero(moving)
    size = rows_asked(moving, bucket)
    if size == 0:
        return x
    if size == len(moving):
        return jump(x, t, s, labels)
    index = torch.from_numpy(np.resize(rows, size))
    if x.is_cuda:
        index = index.pin_memory().to(x.device, non_blocking=True)
    moved = jump(x[index], t[index], s[index], None if labels is None else labels[index])
    return x.index_copy(0, index[: len(rows)], moved[: len(rows)])


def rows_asked(moving: NDArray[np.bool_], bucket: int) -> int:
    """How many rows ``jump`` is asked for."""
    return min(-(-int(moving.sum()) // bucket) * bucket, len(moving))
