"""A data set's likelihood: what belongs to an image stays with it, in whatever batch and beside whatever model."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian, model_log_prob
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.likelihood import bits_per_dim, dequantise
from ctm_fast.evaluation.measure_likelihood import (
    ImageBits,
    Settings,
    error_of_probes,
    image_seeds,
    mean_and_error,
    measure_likelihood,
    paired_difference,
)
from tests.worlds import rotated_gaussian

LEVELS, SHAPE, CPU = Levels(), (1, 2, 3), torch.device("cpu")
IMAGES = torch.randint(60, 200, (7, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = np.array([3, 5, 8, 11, 12, 20, 40])
WORLDS = (Gaussian.isotropic(0.4, SHAPE), rotated_gaussian(SHAPE))
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0])


def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """The first world; the one of each label where there are labels."""
    first, second = (world.denoise(x.double(), sigma) for world in WORLDS)
    D_x = first if labels is None else torch.where(labels.view(-1, 1, 1, 1) == 0, first, second)
    return D_x.to(x.dtype)


def measure(part: slice = slice(None), labels: Tensor | None = LABELS, **settings: object) -> ImageBits:
    return measure_likelihood(
        denoise,
        IMAGES[part],
        None if labels is None else labels[part],
        INDEX[part],
        LEVELS,
        Settings(**{"tolerance": 1e-4, **settings}),  # type: ignore[arg-type]
        device=CPU,
    )


def test_batches_change_nothing() -> None:
    whole, threes, alone = measure(), measure(batch=3), measure(slice(4, 5))
    for name, values in vars(whole).items():
        np.testing.assert_allclose(vars(threes)[name], values, rtol=0, atol=1e-6)
        np.testing.assert_allclose(vars(alone)[name], values[4:5], rtol=0, atol=1e-6)


def test_each_image_is_measured_under_its_label_on_its_own_noise() -> None:
    found = measure(probes="exact", tolerance=1e-5)
    x = dequantise(IMAGES, image_seeds(0, INDEX)).double()
    densities = torch.stack(
        [model_log_prob(world, x, sigma_min=LEVELS.sigma_min, sigma_max=LEVELS.sigma_max) for world in WORLDS]
    )
    exact = bits_per_dim(densities[LABELS, torch.arange(7)], 6, dequantisation="uniform")
    np.testing.assert_allclose(found.bits_per_dim, exact.numpy(), rtol=0, atol=2e-3)
    swapped = measure(probes="exact", labels=1 - LABELS)
    assert np.abs(swapped.bits_per_dim - exact.numpy()).min() > 0.01
    assert (found.probe_error == 0).all()
    unconditional = measure(slice(1, 3), labels=None, probes="exact")
    assert np.abs(unconditional.bits_per_dim - swapped.bits_per_dim[1:3]).max() < 1e-6


def test_random_numbers_belong_to_image_and_seed() -> None:
    seeds = torch.cat([image_seeds(seed, np.arange(1000)) for seed in (0, 1, 2**31 - 1)])
    assert len(seeds.unique()) == 3000
    assert seeds.min() >= 0
    first, again, other = measure(slice(0, 2)), measure(slice(0, 2)), measure(slice(0, 2), seed=1)
    assert np.array_equal(first.bits_per_dim, again.bits_per_dim)
    assert (first.bits_per_dim != other.bits_per_dim).all()


def test_what_is_measured_by_the_published_formula() -> None:
    ours, published = (measure(dequantisation="none", compat=compat) for compat in (None, "published-bug"))
    assert (published.bits_per_dim < ours.bits_per_dim - 0.05).any()
    assert (published.bound != ours.bound).all()


def test_the_bound_is_in_the_same_unit() -> None:
    found = measure(draws=200)
    gap = found.bound - found.bits_per_dim
    assert np.abs(gap.mean()) < 5 * math.sqrt(np.square(found.bound_error).sum()) / 7 + 0.1
    assert (found.bound_error > 0).all()


def test_errors_of_a_mean() -> None:
    assert mean_and_error(np.array([1.0, 2.0, 3.0])) == (2.0, pytest.approx(1 / math.sqrt(3)))
    mean, error = mean_and_error(np.array([4.0]))
    assert mean == 4 and math.isnan(error)
    assert error_of_probes(np.array([0.3, 0.4])) == pytest.approx(0.25)


def test_a_difference_is_paired() -> None:
    """Images of very different bits, models of nearly equal ones: the error is that of the differences."""
    nothing = np.zeros(3)
    one, other = (ImageBits(np.array(bits), *[nothing] * 4) for bits in ([9.0, 1.0, 1.1], [8.9, 0.8, 0.7]))
    assert paired_difference(one, other) == (pytest.approx(0.7 / 3), pytest.approx(0.1527525 / math.sqrt(3)))


def test_progress_ends_with_all_images() -> None:
    seen: list[float] = []
    settings = Settings(tolerance=1e-3, batch=3)
    measure_likelihood(denoise, IMAGES, None, INDEX, LEVELS, settings, device=CPU, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 7
    assert 0 < seen[0] < 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch: expected a positive integer, got 0"),
        ({"probe_count": 0}, "probe_count: expected a positive integer, got 0"),
        ({"seed": -1}, "seed: expected 0 to 2147483647, got -1"),
        ({"seed": 2**31}, "seed: expected 0 to 2147483647, got 2147483648"),
    ],
)
def test_messages(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**settings)  # type: ignore[arg-type]
