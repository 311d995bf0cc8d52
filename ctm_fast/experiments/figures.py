"""What the quality of samples is told by, and the spread of it over seeds."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctm_fast.data import ImageDataset
from ctm_fast.data.order import some
from ctm_fast.diffusion.images import to_float
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.class_variance import within_class_variance_ratio
from ctm_fast.evaluation.extractors import in_domain
from ctm_fast.evaluation.frechet import pixel_frechet
from ctm_fast.evaluation.measure import compare, summarise, warnings

EXTRACTOR_SEED = 1000
"""Another than any run's, whose adversary may look through a classifier of its own."""
EXTRACTOR_STEPS = 1000
METRICS = ("frechet", "kid")
LEAST = 20
"""Samples that a kernel distance needs."""
_REAL, _BATCH = 10_000, 500  # real images at most, in batches


@dataclass(frozen=True)
class Figures:
    """Of one set of samples: ``frechet`` and ``kid`` of in-domain features, ``pixel_frechet`` of pixels.

    ``recognised`` is the share that the extractor's classifier takes for the class asked for, ``variance_ratio`` the
    variance within a class over that of real images, ``kid_error`` the standard error of ``kid``.
    """

    recognised: float
    variance_ratio: float
    frechet: float
    kid: float
    kid_error: float
    pixel_frechet: float


class Judge:
    """Compares samples with real images by the features of a small classifier that is trained on these.

    Args:
        dataset: with labels; ConfigError without.
        count: how many samples will be judged.
        device: where the classifier is.
    """

    def __init__(self, dataset: ImageDataset, count: int, device: torch.device) -> None:
        if dataset.labels is None:
            raise ConfigError(
                f"--preset: expected one of labelled data, for the features of a classifier: {dataset.name}"
            )
        if count < LEAST:
            raise ConfigError(f"--count: expected at least {LEAST} samples, got {count}")
        chosen = some(len(dataset.images), _REAL, EXTRACTOR_SEED)
        self.real, self.labels = dataset.images[chosen].to(device), dataset.labels[chosen].to(device)
        self.count = count
        self.extractor = in_domain(
            self.real,
            self.labels,
            num_classes=dataset.num_classes,
            data=dataset.name,
            seed=EXTRACTOR_SEED,
            steps=EXTRACTOR_STEPS,
        )
        self.reference = summarise(self.extractor, _indexed(self.real), len(self.real), METRICS, samples=count)
        self.warnings: list[str] = []
        self.kid_errors: list[float] = []
        self.floor: dict[str, Any] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Figures:
        """Figures of ``count`` images uint8, made for ``labels``."""
        summary = summarise(self.extractor, _indexed(images), len(images), METRICS)
        found = compare(summary, self.reference, None, METRICS)
        self.floor = {metric: found[metric] for metric in METRICS}
        self.warnings = warnings(summary, self.reference, None)
        self.kid_errors.append(found["kid"]["standard_error"])
        right = sum(int((self._logits(part).argmax(1) == labels[index]).sum()) for index, part in _indexed(images))
        real, generated = to_float(self.real), to_float(images)
        return Figures(
            recognised=right / len(images),
            variance_ratio=within_class_variance_ratio(generated, labels, real, self.labels),
            frechet=found["frechet"]["value"],
            kid=found["kid"]["value"],
            kid_error=found["kid"]["standard_error"],
            pixel_frechet=pixel_frechet(generated, real),
        )

    def describe(self) -> list[str]:
        """What is to be said of the figures, one sentence or two each."""
        facts, error = self.extractor.facts, statistics.fmean(self.kid_errors)
        return [
            f"Features: the last layer of a small classifier trained here on {len(self.real)} of the real images "
            f"(seed {facts['seed']}, right on {100 * float(facts['held_out_accuracy']):.1f} % of those held out, "
            f"sha256 {self.extractor.sha256[:12]}), at the images' own size. The Frechet and kernel distances of such "
            "features compare with each other alone: neither is an FID or a KID of Inception.",
            f"Every row is of {self.count} samples against those real images, from the same noise (seeds 0 to "
            f"{self.count - 1}), classes in turn, pixels rounded to 8 bits. The real images are those that the "
            f"networks were trained on. One standard error of a kernel distance is {error:.2g} in the mean: those near "
            "0 are not told from it. The last row is of as many real images as it says, and shrinks as their number "
            "grows: rows of more samples may lie below it.",
            *self.warnings,
        ]

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.extractor(images).logits
        assert logits is not None
        return logits


def _indexed(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        yield torch.arange(start, start + len(part), device=images.device), part


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, and standard deviation from seed to seed (NaN for one seed)."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float]) -> "Spread":
        """Of the values, at least one."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation, tuple(values))

    def text(self) -> str:
        """``0.372 ± 0.05``, three digits and two, or without the second of one seed."""
        mean = f"{self.mean:.3g}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.2g}"


_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Half of the 95 % interval of Student's t with 1 to 9 degrees of freedom, in standard errors; more take the last."""


def compare_seeds(lower: Spread, higher: Spread) -> str:
    """Whether a figure that is expected to be lower is so, in plain words.

    Seed by seed: with two seeds or more it is so where 0 is outside the 95 % interval of the mean of the differences.
    """
    differences = [high - low for low, high in zip(lower.values, higher.values, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return f"{'lower' if mean > 0 else 'not lower'} with one seed, which tells nothing about others"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = _STUDENT[min(len(differences) - 1, len(_STUDENT)) - 1] * error
    size = abs(mean)
    told = f"by {size:.3g} (95 % interval {size - half:.3g} to {size + half:.3g}, {len(differences)} paired seeds)"
    if size <= half:
        return f"not told apart at this scale: {'lower' if mean > 0 else 'higher'} {told}"
    return f"lower, {told}" if mean > 0 else f"not at this scale: higher, {told}"


def spread(figures: Sequence[Figures], key: Callable[[Figures], float]) -> Spread:
    """``key`` over the figures of each seed."""
    return Spread.over([key(each) for each in figures])
