"""Streamed moments against NumPy, in any batches and over two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctm_fast.evaluation.moments import Moments, moments


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_numpys() -> None:
    features = draw(9, 4).float()
    mean, cov = moments(features)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)


def test_moments_keep_small_variances_beside_large_means() -> None:
    features = (draw(2000, 3) + 4096).float()
    np.testing.assert_allclose(moments(features)[1], np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


def streamed(features: Tensor, sizes: list[int]) -> Moments:
    found = Moments(features.shape[1])
    for batch in features.split(sizes):
        found.update(batch)
    return found


def assert_same(found: Moments, features: Tensor) -> None:
    mean, cov = moments(features)
    assert found.count == len(features)
    torch.testing.assert_close(found.mean, mean, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(found.covariance(), cov, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [[1] * 60, [0, 59, 1], [7, 0, 20, 33]])
def test_batches_do_not_count(sizes: list[int]) -> None:
    features = draw(60, 5) + 100
    assert_same(streamed(features, sizes), features)
    assert_same(streamed(features.flip(0), sizes), features)


def test_merged_parts_are_the_whole() -> None:
    features = draw(60, 5) + 100
    whole = Moments(5)
    for part in features.split([20, 1, 39]):
        whole.merge(streamed(part, [len(part)]))
    whole.merge(Moments(5))
    assert_same(whole, features)


def test_sums_of_squares_would_not_do() -> None:
    """The fault that merging avoids: E[x^2] - E[x]^2 of features far from zero is off in the second digit."""
    features = draw(1000, 2) + 1e7
    naive = (features.T @ features / 1000 - torch.outer(features.mean(0), features.mean(0))) * 1000 / 999
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(streamed(features, [100] * 10).covariance(), expected, rtol=1e-6, atol=1e-8)
    assert abs(naive[0, 0] / expected[0, 0] - 1) > 1e-3


def rank(index: int, directory: str, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=index, world_size=ranks)
    try:
        features = draw(60, 5) + 100
        share = streamed(features[index::ranks], [len(features[index::ranks])])
        share.all_reduce()
        torch.save({"count": share.count, "mean": share.mean, "scatter": share.scatter}, f"{directory}/{index}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path), 2), nprocs=2)
    for index in range(2):
        saved = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        found = Moments(5)
        found.count, found.mean, found.scatter = saved["count"], saved["mean"], saved["scatter"]
        assert_same(found, draw(60, 5) + 100)


def test_without_ranks_nothing_changes() -> None:
    features = draw(60, 5)
    found = streamed(features, [60])
    found.all_reduce()
    assert_same(found, features)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"features: expected \[n, D\] .*, got \[1, 3\]"):
        moments(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="features"):
        moments(torch.zeros(4))
    with pytest.raises(ValueError, match=r"features: expected \[n, 3\], got \[2, 4\]"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least two features for a covariance, got 1"):
        streamed(torch.zeros(1, 3), [1]).covariance()
