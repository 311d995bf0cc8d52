"""Precision, recall, density and coverage against their definitions, written as loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctm_fast.evaluation import neighbours as module
from ctm_fast.evaluation.neighbours import Neighbours, neighbours


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(real: Tensor, generated: Tensor, k: int) -> Neighbours:
    def radii(points: Tensor) -> list[float]:
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    x, y = real.tolist(), generated.tolist()
    real_radii, generated_radii = radii(real), radii(generated)
    inside = np.array([[math.dist(p, q) <= r for q in y] for p, r in zip(x, real_radii, strict=True)])
    back = np.array([[math.dist(p, q) <= r for p in x] for q, r in zip(y, generated_radii, strict=True)])
    return Neighbours(inside.any(0).mean(), back.any(0).mean(), inside.sum() / (k * len(y)), inside.any(1).mean())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tile", [(1024, 4096), (7, 5)])
def test_definition(k: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one tile and in many, the numbers of samples being no multiples of theirs."""
    monkeypatch.setattr(module, "_ROWS", tile[0])
    monkeypatch.setattr(module, "_COLUMNS", tile[1])
    real, generated = draw(40, 3) + 10, 0.7 * draw(33, 3, seed=1) + 10.4
    found, expected = neighbours(real, generated, k=k), definition(real, generated, k)
    assert vars(found) == pytest.approx(vars(expected), abs=1e-12)
    assert len(set(vars(found).values())) == 4


def test_precision_is_not_recall() -> None:
    """Planted fault: swapped, they fail here. Samples of one mode of two are precise and cover half."""
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0]]).double()
    real = draw(200, 2) + modes[torch.arange(200) % 2]
    narrow = neighbours(real, draw(200, 2, seed=1))
    assert narrow.precision > 0.9
    assert 0.3 < narrow.recall < 0.6
    assert 0.3 < narrow.coverage < 0.6
    wide = neighbours(real, torch.cat([real + 0.01, draw(200, 2, seed=2) + 500]))
    assert 0.4 < wide.precision < 0.6
    assert wide.recall > 0.9


def test_many_outliers_raise_no_density() -> None:
    """Naeem's point: one real outlier makes a large ball; density counts it once, among k."""
    real = torch.cat([draw(100, 2), torch.tensor([[30.0, 30.0]]).double()])
    between = torch.full((100, 2), 12.0).double() + 0.01 * draw(100, 2, seed=1)
    found = neighbours(real, between)
    assert found.precision == 1
    assert found.density == pytest.approx(1 / 3)
    assert found.coverage == pytest.approx(1 / 101)


def test_far_from_the_origin_nothing_changes() -> None:
    """Post-ReLU features lie far from it: |x|^2 - 2 x y + |y|^2 would lose them there."""
    real, generated = draw(50, 3), draw(50, 3, seed=1)
    assert neighbours(real + 1e7, generated + 1e7) == neighbours(real, generated)


@pytest.mark.parametrize(("n", "m", "d", "k"), [(3, 10, 2, 3), (10, 3, 2, 3), (10, 10, 3, 3), (10, 10, 2, 0)])
def test_refused(n: int, m: int, d: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"of more than k = {k} samples, got \[{n}, 2\] and \[{m}, {d}\]"):
        neighbours(torch.zeros(n, 2), torch.zeros(m, d), k=k)
