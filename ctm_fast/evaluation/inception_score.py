"""The Inception score of a classifier's predictions."""

import torch
from torch import Tensor

from ctm_fast.distributed import sum_over_ranks_


class InceptionScore:
    """exp(E_x KL(p(y | x) || p(y))) in each of several splits of the samples (arXiv 1606.03498, Sec. 4).

    Sample ``i`` of n belongs to split floor(i splits / n), as published: the score is biased downwards by small splits,
    so that only scores of equal n and splits compare. Sums are in float64, whatever the batches.

    Args:
        count: n, of all ranks.
        classes: of the classifier.
        splits: in how many parts.

    Raises ValueError for fewer samples than splits.
    """

    def __init__(self, count: int, classes: int, *, splits: int = 10, device: torch.device | str = "cpu") -> None:
        if not 1 <= splits <= count:
            raise ValueError(f"splits: expected 1 to {count}, the number of samples, got {splits}")
        self.total, self.splits = count, splits
        self._counts = torch.zeros(splits, dtype=torch.float64, device=device)
        self._probabilities = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self._negentropies = torch.zeros(splits, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Add logits [b, classes] of the samples ``index`` [b] in 0..n-1."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        split = index * self.splits // self.total
        self._counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self._probabilities.index_add_(0, split, p)
        self._negentropies.index_add_(0, split, (p * log_p).sum(1))

    def all_reduce(self) -> None:
        """Add up over all ranks; nothing where there is no process group."""
        for sums in (self._counts, self._probabilities, self._negentropies):
            sum_over_ranks_(sums)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation (over the number of splits) of the splits' scores.

        Raises ValueError where not every sample of 0..n-1 was given.
        """
        if int(self._counts.sum()) != self.total or not self._counts.all():
            raise ValueError(f"logits: expected those of {self.total} samples, got {int(self._counts.sum())}")
        marginal = self._probabilities / self._counts[:, None]
        # KL = E[sum p log p] - sum p(y) log p(y)
        scores = (self._negentropies / self._counts - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
