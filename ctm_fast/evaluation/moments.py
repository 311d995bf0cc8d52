"""Mean and covariance of features that come batch by batch, in float64."""

import torch
from torch import Tensor

from ctm_fast.distributed import sum_over_ranks_


class Moments:
    """Count, mean and scatter (the sum of squared deviations) of feature vectors.

    Batches are merged by Chan, Golub and LeVeque's formula (1979), never by E[x^2] - E[x]^2, which cancels:

        scatter = scatter_1 + scatter_2 + n_1 n_2 / (n_1 + n_2) (mean_2 - mean_1) (mean_2 - mean_1)^T

    so that size, order and distribution over ranks of the batches change the result by float64's rounding alone.

    Args:
        dim: of the vectors.
        device: where they come from; the sums stay there.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features [n, D], any n. Raises ValueError for another shape."""
        if features.dim() != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: expected [n, {len(self.mean)}], got {list(features.shape)}")
        if len(features) == 0:
            return
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        self.scatter.addmm_(centred.T, centred)
        self._shift(len(features), mean)

    def merge(self, other: "Moments") -> None:
        """Add what ``other`` has counted."""
        if other.count:
            self.scatter += other.scatter
            self._shift(other.count, other.mean)

    def all_reduce(self) -> None:
        """Merge over all ranks, each of which then has the whole; nothing where there is no process group."""
        count = sum_over_ranks_(torch.tensor(self.count, dtype=torch.int64, device=self.mean.device))
        total = max(int(count), 1)
        mean = sum_over_ranks_(self.mean * (self.count / total))
        self.scatter.addr_(self.mean - mean, self.mean - mean, alpha=self.count)
        sum_over_ranks_(self.scatter)
        self.count, self.mean = int(count), mean

    def covariance(self) -> Tensor:
        """[D, D], unbiased (over n - 1). Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"moments: expected at least two features for a covariance, got {self.count}")
        return self.scatter / (self.count - 1)

    def _shift(self, count: int, mean: Tensor) -> None:
        """Count and mean with ``count`` vectors of mean ``mean`` more, whose own scatter is added already."""
        total = self.count + count
        delta = mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] (over n - 1), both float64, of features [n, D].

    Raises ValueError where features are not [n, D] with n of at least 2.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: expected [n, D] with n at least 2, got {list(features.shape)}")
    found = Moments(features.shape[1], features.device)
    found.update(features)
    return found.mean, found.covariance()
