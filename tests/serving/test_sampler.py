"""The sampler: an image is a function of its seed and class, in whatever company it is made."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctm_fast.errors import CheckpointError, ConfigError, LevelError
from ctm_fast.models import CTM, EDMDenoiser, load_model, save_model
from ctm_fast.sample import load
from ctm_fast.samplers import initial_noise
from ctm_fast.serving import Sampler
from tests.snapshots import save_snapshot, small_config

TOGETHER = 1e-5
"""How far an image may move with the batch it is in, in [-1, 1]: convolutions of another batch round differently."""


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("snapshots")
    return {
        "ctm": save_snapshot(folder / "ctm.safetensors", CTM),
        "unconditional": save_snapshot(folder / "unconditional.safetensors", CTM, classes=0),
        "teacher": save_snapshot(folder / "teacher.safetensors", EDMDenoiser),
    }


@pytest.fixture(scope="module")
def sampler(snapshots: dict[str, Path]) -> Sampler:
    return load(snapshots["ctm"], device="cpu")


def images(sampler: Sampler, *arguments: Any, **options: Any) -> Tensor:
    result = sampler(*arguments, **options)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.0), (3, 0.0), (3, 0.5), (3, 1.0)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_image_of_a_seed_does_not_depend_on_the_batch(sampler: Sampler, batch: int, steps: int, gamma: float) -> None:
    seeds = list(range(20, 84))
    expected = images(sampler, seeds, steps=steps, gamma=gamma)
    divided = Sampler(sampler.model, sampler.levels, batch=batch)
    got = images(divided, seeds, steps=steps, gamma=gamma)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= TOGETHER


def test_image_of_a_seed_does_not_depend_on_the_order(sampler: Sampler) -> None:
    seeds = [5, 900, 2**63 - 1, 0, 5]
    got = images(sampler, seeds, steps=2, gamma=0.7, labels=3)
    assert torch.equal(got[0], got[4])
    reversed_ = images(sampler, seeds[::-1], steps=2, gamma=0.7, labels=3).flip(0)
    assert (got - reversed_).abs().max() <= TOGETHER
    assert (got[0] - got[1]).abs().max() > 0.1


def test_noise_is_the_same_in_any_batch(sampler: Sampler) -> None:
    """The noise itself not only nearly, but bit for bit."""
    seeds = torch.arange(64)
    whole = initial_noise(seeds, (1, 8, 8), sampler.levels)
    for batch in (1, 7):
        parts = [initial_noise(seeds[i : i + batch], (1, 8, 8), sampler.levels) for i in range(0, 64, batch)]
        assert torch.equal(torch.cat(parts), whole)


def test_gamma_0_is_deterministic_and_gamma_is_felt(sampler: Sampler) -> None:
    seeds = range(8)
    first = images(sampler, seeds, steps=3)
    assert torch.equal(first, images(sampler, seeds, steps=3))
    noisy = images(sampler, seeds, steps=3, gamma=1.0)
    assert torch.equal(noisy, images(sampler, seeds, steps=3, gamma=1.0))  # its noise is of the seed, too
    assert (noisy - first).abs().max() > 0.01
    assert torch.equal(images(sampler, seeds, steps=1, gamma=1.0), images(sampler, seeds, steps=1))


def test_float(sampler: Sampler) -> None:
    x = images(sampler, range(5))
    assert (x.dtype, x.shape) == (torch.float32, (5, 1, 8, 8))
    assert -1 <= x.min() < x.max() <= 1


def test_uint8_is_rounded(sampler: Sampler) -> None:
    x = images(sampler, range(64)).permute(0, 2, 3, 1)
    x8 = images(sampler, range(64), output="uint8")
    assert (x8.dtype, x8.shape) == (torch.uint8, (64, 8, 8, 1))
    levels = 127.5 * x.double() + 127.5
    inside = (levels > 0) & (levels < 255)
    assert inside.sum() > 100
    assert (x8.double() - levels).abs().max() <= 0.5 + 1e-4  # truncation would reach 1
    assert (x8.double() - levels)[inside].mean().abs() < 0.05  # and lie 0.5 below on average


def test_pil(sampler: Sampler) -> None:
    pictures = sampler(range(3), output="pil")
    assert isinstance(pictures, list)
    x8 = images(sampler, range(3), output="uint8")
    for picture, array in zip(pictures, x8, strict=True):
        assert isinstance(picture, Image.Image)
        assert (picture.size, picture.mode) == ((8, 8), "L")
        assert np.array_equal(np.asarray(picture), array[..., 0])


def test_no_seeds(sampler: Sampler) -> None:
    assert images(sampler, []).shape == (0, 1, 8, 8)
    assert images(sampler, [], output="uint8").shape == (0, 8, 8, 1)
    assert sampler([], output="pil") == []


def test_labels(sampler: Sampler) -> None:
    assert sampler.labels_of([0, 9, 10, 23]) == [0, 9, 0, 3]
    assert sampler.labels_of([4, 5], 7) == [7, 7]
    by_default = images(sampler, [0, 11, 22])
    assert torch.equal(by_default, images(sampler, [0, 11, 22], labels=[0, 1, 2]))
    assert (by_default - images(sampler, [0, 11, 22], labels=9)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, list])
def test_integers_of_any_kind(sampler: Sampler, kind: Any) -> None:
    seeds, labels = kind([3, 4]), kind([1, 2])
    assert torch.equal(images(sampler, seeds, labels=labels), images(sampler, [3, 4], labels=[1, 2]))


def test_unconditional(snapshots: dict[str, Path]) -> None:
    sampler = load(snapshots["unconditional"], device="cpu")
    assert sampler.num_classes == 0
    assert sampler.labels_of([1, 2]) is None
    assert images(sampler, range(3), steps=2, gamma=0.5).shape == (3, 1, 8, 8)
    with pytest.raises(ConfigError, match="labels: expected None for an unconditional model"):
        sampler([1], labels=0)


def test_teacher(snapshots: dict[str, Path]) -> None:
    sampler = load(snapshots["teacher"], device="cpu")
    one, eighteen = images(sampler, range(4)), images(sampler, range(4), steps=18)
    assert one.shape == eighteen.shape == (4, 1, 8, 8)
    assert (one - eighteen).abs().max() > 0.01
    with pytest.raises(ConfigError, match=r"gamma: expected 0 for a teacher.* got 0\.5"):
        sampler([1], gamma=0.5)


def test_bfloat16(snapshots: dict[str, Path], sampler: Sampler) -> None:
    """Within 2e-2 on average in [-1, 1]: bfloat16 keeps 8 bits, and the preconditioning stays in float32."""
    x = images(sampler, range(64))
    rough = images(load(snapshots["ctm"], device="cpu", dtype=torch.bfloat16), range(64))
    assert rough.dtype == torch.float32
    assert 0 < (rough - x).abs().mean() <= 2e-2


def test_threads_at_once(sampler: Sampler) -> None:
    """Sixteen threads on one sampler, each with its own seeds, levels and noise."""
    jobs = [(range(i, i + 5), 1 + i % 3, 0.25 * (i % 4)) for i in range(64)]
    expected = [images(sampler, seeds, steps=steps, gamma=gamma) for seeds, steps, gamma in jobs]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda job: images(sampler, job[0], steps=job[1], gamma=job[2]), jobs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_calls_leave_no_gradients_and_no_random_state(sampler: Sampler) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert not images(sampler, range(3), steps=3, gamma=1.0).requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [-1]}, r"seeds: expected integers in 0\.\.9223372036854775807, got -1"),
        ({"seeds": [2**63]}, "seeds: .* got 9223372036854775808"),
        ({"seeds": [0.5]}, r"seeds: .* got 0\.5"),
        ({"seeds": "12"}, "seeds: .* got '1'"),
        ({"seeds": 7}, "seeds: expected a sequence of integers, got 7"),
        ({"steps": 0}, "steps: .* got 0"),
        ({"steps": 10_001}, "steps: .* got 10001"),
        ({"steps": 1.5}, r"steps: .* got 1\.5"),
        ({"gamma": -0.1}, r"gamma: .* got -0\.1"),
        ({"gamma": 1.1}, r"gamma: .* got 1\.1"),
        ({"gamma": float("nan")}, "gamma: .* got nan"),
        ({"gamma": "0.5"}, r"gamma: .* got '0\.5'"),
        ({"labels": 10}, r"labels: expected integers in 0\.\.9, got 10"),
        ({"labels": [0, -1]}, "labels: .* got -1"),
        ({"labels": [1]}, "labels: expected 2, one for each seed, got 1"),
        ({"labels": 0.5}, r"labels: .* got 0\.5"),
        ({"output": "jpeg"}, "output: expected one of float, uint8, pil, got 'jpeg'"),
    ],
)
def test_bad_arguments(sampler: Sampler, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, LevelError), match=message):
        sampler(**{"seeds": [0, 1], **arguments})


def test_bad_load(snapshots: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype: .* got torch\.int64"):
        load(snapshots["ctm"], device="cpu", dtype=torch.int64)
    with pytest.raises(ConfigError, match="device: expected cpu or cuda, got 'meta'"):
        load(snapshots["ctm"], device="meta")
    model, _ = load_model(snapshots["ctm"])
    for name, config in (("none", {}), ("crossed", {"config": {"levels": {"sigma_min": 90.0}}})):
        save_model(tmp_path / name, model, small_config(10).network, config)
        with pytest.raises(CheckpointError, match=f"{name}: expected the noise levels of the model"):
            load(tmp_path / name, device="cpu")
