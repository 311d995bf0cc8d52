"""All features of a set of images, for the distances that need pairs of them."""

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
        self._seen = torch.zeros(count, dtype=torch.int32, device=device)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Put features [b, D] at ``index`` [b]."""
        self.features[index] = features.float()
        self._seen.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def all_reduce(self) -> None:
        """Give every rank all features; nothing where there is no process group.

        Raises ValueError where an image's features were given by no rank or by two.
        """
        sum_over_ranks_(self.features)  # exact: all but one rank have zeros there
        sum_over_ranks_(self._seen)
        wrong = int((self._seen != 1).sum())
        if wrong:
            raise ValueError(f"index: expected each of {len(self._seen)} images once, but {wrong} are not")
