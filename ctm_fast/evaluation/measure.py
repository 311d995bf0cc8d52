"""All metrics of samples against a reference, from one pass over the images of each."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctm_fast.data.order import shuffled
from ctm_fast.distributed import sum_over_ranks_
from ctm_fast.errors import ConfigError, DataError
from ctm_fast.evaluation.extractors import Extractor, Features
from ctm_fast.evaluation.feature_table import FeatureTable, Rows
from ctm_fast.evaluation.frechet import frechet_distance, numerical_rank
from ctm_fast.evaluation.inception_score import InceptionScore
from ctm_fast.evaluation.kernel_distance import kernel_distance
from ctm_fast.evaluation.moments import Moments
from ctm_fast.evaluation.moments_file import StoredMoments
from ctm_fast.evaluation.neighbours import neighbours

METRICS = ("kid", "frechet", "spatial-frechet", "inception-score", "neighbours")
_SPLITS = 10
_FLOOR_SEED = 0
_LEAST = 2  # images, of which a covariance can be had

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs (index [b] int64, images [b, C, H, W] uint8): this rank's share of images 0..n-1, in any order."""


@dataclass
class Summary:
    """What one pass leaves of a set of images; what was not asked for, or the extractor does not have, is None.

    The moments of a reference are kept in two parts, to compare with each other, and merged when they are asked for:
    of 2,048 features each is 34 MB.
    """

    count: int
    parts: list[Moments]
    spatial_parts: list[Moments] | None
    table: Tensor | None
    score: tuple[float, float] | None
    halves: "Halves | None" = None

    @property
    def moments(self) -> Moments:
        """Of all images."""
        return _merged(self.parts)

    @property
    def spatial(self) -> Moments | None:
        """Of all images."""
        return None if self.spatial_parts is None else _merged(self.spatial_parts)


@dataclass
class Halves:
    """The images of the two disjoint parts of a reference, the first as many as there are samples."""

    first: Tensor
    rest: Tensor


def check_metrics(metrics: Collection[str]) -> None:
    """Raise ConfigError naming the first that is none of :data:`METRICS`."""
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"metrics: expected some of {', '.join(METRICS)}, got {metric!r}")


def summarise(
    extractor: Extractor,
    batches: Batches,
    count: int,
    metrics: Collection[str] = METRICS,
    *,
    samples: int | None = None,
) -> Summary:
    """Pass over images once.

    Args:
        extractor: makes the features.
        batches: this rank's share of the images.
        count: n, of all ranks.
        metrics: some of :data:`METRICS`; only what they need is kept.
        samples: of a reference, how many samples are to be compared with it: two parts of it, one of that size if it
            has twice as many images, else both halves, are kept apart for the floor.

    Raises DataError for fewer than two images, features that are not finite, an image that is missing or there twice.
    """
    check_metrics(metrics)
    if count < _LEAST:
        raise DataError(f"images: expected at least {_LEAST}, got {count}")
    first = _first_part(count, min(samples, count // 2)) if samples is not None and count >= 2 * _LEAST else None
    sums: _Sums | None = None
    for index, images in batches:
        features = extractor(images)
        for part in (features.pooled, features.spatial, features.logits):
            if part is not None and not bool(part.isfinite().all()):
                broken = index.to(part.device)[~part.isfinite().all(1)]
                raise DataError(f"images: the features of image {int(broken[0])} are not finite ({len(broken)} such)")
        sums = sums or _Sums(features, count, metrics, first)
        sums.update(features, index.to(features.pooled.device))
    if sums is None:
        raise DataError("images: expected some on every rank, got none")
    return sums.result()


class _Sums:
    """What a pass adds up. The two parts of a reference are kept apart and merged at the end."""

    def __init__(self, like: Features, count: int, metrics: Collection[str], first: Tensor | None) -> None:
        device = like.pooled.device
        parts = 1 if first is None else 2
        self.count = count
        self.seen = torch.zeros(count, dtype=torch.int32, device=device)
        self.part = torch.zeros(count, dtype=torch.int64, device=device)
        if first is not None:
            self.part[first.to(device)] = 1
        self.moments = [Moments(like.pooled.shape[1], device) for _ in range(parts)]
        self.spatial, self.table, self.score = None, None, None
        if like.spatial is not None and "spatial-frechet" in metrics:
            self.spatial = [Moments(like.spatial.shape[1], device) for _ in range(parts)]
        if not {"kid", "neighbours"}.isdisjoint(metrics):
            self.table = FeatureTable(count, like.pooled.shape[1], device)
        if like.logits is not None and "inception-score" in metrics and count >= _SPLITS:
            self.score = InceptionScore(count, like.logits.shape[1], splits=_SPLITS, device=device)

    def update(self, features: Features, index: Tensor) -> None:
        self.seen.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        for part in range(len(self.moments)):
            members = self.part[index] == part
            self.moments[part].update(features.pooled[members])
            if self.spatial is not None and features.spatial is not None:
                self.spatial[part].update(features.spatial[members])
        if self.table is not None:
            self.table.update(features.pooled, index)
        if self.score is not None and features.logits is not None:
            self.score.update(features.logits, index)

    def result(self) -> Summary:
        wrong = (sum_over_ranks_(self.seen) != 1).nonzero()[:, 0]
        if len(wrong):
            raise DataError(
                f"images: expected each of {self.count} once, but {len(wrong)} are missing or there twice, "
                f"image {int(wrong[0])} among them"
            )
        for sums in (*self.moments, *(self.spatial or []), self.table, self.score):
            if sums is not None:
                sums.all_reduce()
        halves = None
        if len(self.moments) == 2:
            halves = Halves((self.part == 1).nonzero()[:, 0], (self.part == 0).nonzero()[:, 0])
        return Summary(
            self.count,
            self.moments,
            self.spatial,
            None if self.table is None else self.table.features,
            None if self.score is None else self.score.result(),
            halves,
        )


def compare(
    samples: Summary, reference: Summary | None, stored: StoredMoments | None, metrics: Collection[str] = METRICS
) -> dict[str, Any]:
    """The metrics of ``samples``.

    Args:
        samples: their summary.
        reference: that of real images, with ``samples=`` their number; None where there are only stored moments.
        stored: moments that take the place of the reference's own in the Frechet distances.
        metrics: some of :data:`METRICS`.

    Returns:
        For each metric a dictionary of numbers: ``value`` or its own names, and ``floor``, the same between two parts
        of the reference that share no image, of ``floor_count`` and the remaining images. In place of a metric that
        cannot be had there is a text that says why.
    """
    check_metrics(metrics)
    found: dict[str, Any] = {}
    halves = None if reference is None else reference.halves
    for metric in METRICS:
        if metric not in metrics:
            continue
        if metric == "frechet":
            real = [] if reference is None else reference.parts
            found[metric] = _frechet(samples.moments, real, _pair(stored))
        elif metric == "spatial-frechet":
            found[metric] = _spatial(samples, reference, stored)
        elif metric == "inception-score":
            found[metric] = _score(samples, reference)
        elif reference is None or reference.table is None or samples.table is None:
            found[metric] = "needs the images of the reference, which has only moments"
        else:
            table = reference.table
            parts = None if halves is None else (Rows(table, halves.rest), Rows(table, halves.first))
            found[metric] = (_kernel if metric == "kid" else _neighbours)(table, samples.table, parts)
    return found


def warnings(samples: Summary, reference: Summary | None, stored: StoredMoments | None) -> list[str]:
    """What is to be said of too few images, whose covariance does not have full rank."""
    dim = len(samples.moments.mean)
    sides = {"samples": (samples.count, samples.moments.covariance())}
    if stored is not None and stored.count is not None:
        sides["reference"] = stored.count, stored.covariance
    elif reference is not None:
        sides["reference"] = reference.count, reference.moments.covariance()
    return [
        f"{name}: {count} images are too few for features of {dim} dimensions: their covariance has rank "
        f"{numerical_rank(covariance)}, and the Frechet distance is far above that of many images; go by the kernel "
        "distance, and by the floor"
        for name, (count, covariance) in sides.items()
        if count <= dim
    ]


def _first_part(count: int, size: int) -> Tensor:
    return torch.from_numpy(shuffled(count, _FLOOR_SEED + 2**32)[:size])


def _merged(parts: list[Moments]) -> Moments:
    if len(parts) == 1:
        return parts[0]
    whole = Moments(len(parts[0].mean), parts[0].mean.device)
    for part in parts:
        whole.merge(part)
    return whole


def _pair(stored: StoredMoments | None) -> tuple[Tensor, Tensor] | None:
    return None if stored is None else (stored.mean, stored.covariance)


def _distance(moments: Moments, other: tuple[Tensor, Tensor]) -> float:
    mean, covariance = (tensor.to(moments.mean.device) for tensor in other)
    if mean.shape != moments.mean.shape:
        raise DataError(f"reference: expected moments of {len(moments.mean)} dimensions, got {len(mean)}")
    return frechet_distance(moments.mean, moments.covariance(), mean, covariance)


def _frechet(
    samples: Moments,
    reference: list[Moments],
    stored: tuple[Tensor, Tensor] | None,
) -> dict[str, Any] | str:
    if stored is None and not reference:
        return "needs moments of the reference"
    value = _distance(samples, _mean_and_covariance(_merged(reference)) if stored is None else stored)
    found: dict[str, Any] = {"value": value, "floor": None, "floor_count": None}
    if len(reference) == 2:
        rest, first = reference
        found |= {"floor": _distance(first, _mean_and_covariance(rest)), "floor_count": first.count}
    return found


def _mean_and_covariance(moments: Moments) -> tuple[Tensor, Tensor]:
    return moments.mean, moments.covariance()


def _spatial(samples: Summary, reference: Summary | None, stored: StoredMoments | None) -> dict[str, Any] | str:
    if samples.spatial is None:
        return "the extractor has no spatial features"
    pair = stored.spatial if stored is not None else None
    parts = None if reference is None else reference.spatial_parts
    if pair is None and parts is None:
        return "the reference has no spatial moments"
    return _frechet(samples.spatial, parts or [], pair)


def _score(samples: Summary, reference: Summary | None) -> dict[str, Any] | str:
    if samples.score is None:
        return f"needs a classifier and {_SPLITS} images or more"
    mean, deviation = samples.score
    real = None if reference is None or reference.score is None else reference.score[0]
    return {"value": mean, "deviation": deviation, "splits": _SPLITS, "reference": real}


def _kernel(real: Tensor, generated: Tensor, parts: tuple[Rows, Rows] | None) -> dict[str, Any] | str:
    try:
        found: dict[str, Any] = vars(kernel_distance(real, generated)).copy()
    except ValueError as error:
        return str(error)
    found |= {"floor": None, "floor_standard_error": None, "floor_count": None}
    if parts is not None and len(parts[1]) >= 20:
        floor = kernel_distance(*parts)
        found |= {
            "floor": floor.value,
            "floor_standard_error": floor.standard_error,
            "floor_count": len(parts[1]),
        }
    return found


def _neighbours(real: Tensor, generated: Tensor, parts: tuple[Rows, Rows] | None) -> dict[str, Any] | str:
    try:
        found: dict[str, Any] = {**vars(neighbours(real, generated)), "floor": None, "floor_count": None}
    except ValueError as error:
        return str(error)
    if parts is not None and len(parts[1]) > 3:
        found |= {"floor": vars(neighbours(*parts)), "floor_count": len(parts[1])}
    return found
