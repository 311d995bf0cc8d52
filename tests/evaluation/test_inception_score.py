"""The Inception score of predictions whose score is known."""

import math

import pytest
import torch
from torch import Tensor

from ctm_fast.evaluation.inception_score import InceptionScore


def score(logits: Tensor, splits: int, size: int = 7) -> tuple[float, float]:
    found = InceptionScore(len(logits), logits.shape[1], splits=splits)
    for index in torch.arange(len(logits)).split(size):
        found.update(logits[index], index)
    found.all_reduce()
    return found.result()


def test_certain_and_uniform_predictions() -> None:
    """Certain of each of C classes in turn: C. The same for all samples: 1."""
    certain = torch.where(torch.eye(5, dtype=torch.bool).repeat(20, 1), 0.0, -math.inf)
    assert score(certain.clamp(min=-1e4), 4) == pytest.approx((5, 0))
    assert score(torch.randn(5).expand(40, 5), 4) == pytest.approx((1, 0))


def test_definition() -> None:
    """Split by split, in one go."""
    logits = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))
    scores = []
    for split in range(10):
        members = [i for i in range(103) if i * 10 // 103 == split]
        p = logits[members].double().softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp())
    stacked = torch.stack(scores)
    expected = float(stacked.mean()), float(stacked.std(correction=0))
    assert score(logits, 10) == pytest.approx(expected, rel=1e-12)
    assert score(logits, 10, size=1) == pytest.approx(expected, rel=1e-12)


def test_order_does_not_count() -> None:
    logits = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))
    found = InceptionScore(103, 6)
    order = torch.randperm(103, generator=torch.Generator().manual_seed(1))
    found.update(logits[order], order)
    assert found.result() == pytest.approx(score(logits, 10), rel=1e-12)


def test_refused() -> None:
    with pytest.raises(ValueError, match="splits: expected 1 to 9, the number of samples, got 10"):
        InceptionScore(9, 3)
    found = InceptionScore(20, 3)
    found.update(torch.zeros(19, 3), torch.arange(19))
    with pytest.raises(ValueError, match="logits: expected those of 20 samples, got 19"):
        found.result()
