"""All features of a set of images, for the distances that need pairs of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ctm_fast.distributed import sum_over_ranks_


class FeatureTable:
    """Features [n, D] in float32 by the index of their image: in whatever order and on whatever rank they come.

    50,000 features of 2,048 dimensions are 410 MB.

    Args:
        count: n, of all ranks.
        dim: D.
    """

    def __init__(self, count: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.features = torch.zeros(count, dim, device=device)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Put features [b, D] at ``index`` [b]."""
        self.features[index] = features.float()

    def all_reduce(self) -> None:
        """Give every rank all features; nothing where there is no process group. Each image is of one rank alone."""
        sum_over_ranks_(self.features)  # exact: all but one rank have zeros there


class Rows:
    """Some rows of a table [n, D] as features of their own, which are copied where they are read, not before.

    Args:
        table: [n, D].
        index: [m] int64 on its device.
    """

    def __init__(self, table: Tensor, index: Tensor) -> None:
        self._table, self._index = table, index
        self.shape = torch.Size((len(index), table.shape[1]))
        self.device = table.device

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        return self._table[self._index[key]]

    def dim(self) -> int:
        """2"""
        return len(self.shape)

    def split(self, size: int) -> Iterator[Tensor]:
        """``size`` rows at a time."""
        return (self._table[part] for part in self._index.split(size))
