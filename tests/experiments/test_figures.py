"""Figures of samples, and what is said of them over seeds."""

import math
from dataclasses import replace

import pytest
import torch

from ctm_fast.data import ImageDataset, load_dataset
from ctm_fast.errors import ConfigError
from ctm_fast.experiments import figures
from ctm_fast.experiments.figures import Judge, Spread, compare_seeds


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits", resolution=8, labels=True)


@pytest.fixture
def judge(digits: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.setattr(figures, "EXTRACTOR_STEPS", 60)
    return Judge(digits, 500, torch.device("cpu"))


def test_real_images_are_at_the_floor_and_others_are_not(
    judge: Judge, digits: ImageDataset, generator: torch.Generator
) -> None:
    assert digits.labels is not None
    chosen = torch.randperm(len(digits.images), generator=generator)[:500]
    real, labels = digits.images[chosen], digits.labels[chosen]
    found = judge(real, labels)
    assert found.frechet < judge.floor["frechet"]["floor"]
    assert abs(found.kid) < 4 * found.kid_error
    assert abs(found.variance_ratio - 1) < 0.1
    assert found.recognised > 0.7
    wrong = judge(real, (labels + 1) % 10)
    assert wrong.recognised < 0.1 and wrong.frechet == found.frechet
    noise = torch.randint(256, real.shape, generator=generator, dtype=torch.uint8)
    far = judge(noise, labels)
    assert far.frechet > 10 * found.frechet and far.kid > 20 * far.kid_error
    assert far.pixel_frechet > 10 * found.pixel_frechet


def test_what_is_said_of_the_figures(judge: Judge, digits: ImageDataset) -> None:
    assert digits.labels is not None
    judge(digits.images[:100], digits.labels[:100])
    told = " ".join(judge.describe())
    assert "seed 1000" in told and judge.extractor.sha256[:12] in told and "neither is an FID" in told
    assert "too few for features of 256 dimensions" in told  # 100 images


def test_data_without_labels(digits: ImageDataset) -> None:
    with pytest.raises(ConfigError, match="--preset: expected one of labelled data"):
        Judge(replace(digits, labels=None), 500, torch.device("cpu"))


def test_spread() -> None:
    three = Spread.over([1.0, 2.0, 3.0])
    assert (three.mean, three.deviation) == (2.0, 1.0)
    assert three.text() == "2 ± 1"
    assert Spread.over([0.12345]).text() == "0.123" and math.isnan(Spread.over([1.0]).deviation)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (
            [1.0, 2.0, 3.0],
            [2.0, 3.1, 3.9],
            "lower, by 1 (95 % interval 0.752 to 1.25, 3 paired seeds)",
        ),  # seeds differ by more than variants do: paired
        ([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], "not at this scale: higher, by 1 (95 % interval 0.752 to 1.25"),
        ([1.0, 2.0, 3.0], [1.5, 1.0, 3.5], "not told apart at this scale: higher by 0 (95 % interval"),
        ([1.0], [2.0], "lower with one seed, which tells nothing"),
        ([2.0], [1.0], "not lower with one seed"),
    ],
)
def test_comparison_over_seeds(one: list[float], other: list[float], told: str) -> None:
    assert compare_seeds(Spread.over(one), Spread.over(other)).startswith(told)
