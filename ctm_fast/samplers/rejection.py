"""Classifier-rejection sampling: more images than wanted, of which a classifier keeps the best of each class."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Sample = Callable[[Sequence[int], Sequence[int]], Tensor]
"""sample(seeds, labels) -> images [B, ...]."""

LogProb = Callable[[Tensor, Tensor], Tensor]
"""log_prob(images, labels) -> [B], log p(label | image)."""


MOST_OVERSAMPLING = 1000
MOST_KEPT = 10_000_000
"""Of one class."""


@dataclass(frozen=True)
class Kept:
    """What was kept, class by class, the best of each first."""

    images: Tensor
    labels: list[int]
    seeds: list[int]
    log_probs: list[float]


def rejection_sample(
    sample: Sample,
    log_prob: LogProb,
    counts: Mapping[int, int],
    *,
    oversampling: float = 0.5,
    first_seed: int = 0,
    batch: int = 256,
) -> Kept:
    """Make ceil((1 + oversampling) n) images of each class and keep the n that the classifier is surest of.

    Args:
        sample: makes the images of seeds and labels, a batch at a time.
        log_prob: judges them.
        counts: class -> n; exactly as many are kept of each.
        oversampling: 0 keeps every image.
        first_seed: classes take consecutive ranges of seeds from here on, in the order of ``counts``, so that the
            result does not depend on ``batch``; of two images judged alike the lower seed is kept.

    Raises ValueError naming the argument, before any image is made (of ``log_prob``: after the first).
    """
    if not 0 <= oversampling <= MOST_OVERSAMPLING:
        raise ValueError(f"oversampling: expected a number in 0..{MOST_OVERSAMPLING}, got {oversampling}")
    if batch < 1:
        raise ValueError(f"batch: expected a positive integer, got {batch}")
    if first_seed < 0:
        raise ValueError(f"first_seed: expected a seed from 0 on, got {first_seed}")
    for label, count in counts.items():
        if not isinstance(count, int) or not 1 <= count <= MOST_KEPT:
            raise ValueError(f"counts: expected integers in 1..{MOST_KEPT}, got {count!r} for class {label}")
    if not counts:
        raise ValueError("counts: expected at least one class, got none")
    made = {label: math.ceil((1 + oversampling) * count) for label, count in counts.items()}
    asked = ((first_seed + i, label) for i, label in enumerate(_repeat(made)))
    best: dict[int, list[tuple[float, int, Tensor]]] = {label: [] for label in counts}
    while chunk := list(itertools.islice(asked, batch)):
        seeds, labels = [seed for seed, _ in chunk], [label for _, label in chunk]
        images = sample(seeds, labels)
        judgement = log_prob(images, torch.tensor(labels, device=images.device))
        if judgement.shape != (len(chunk),):
            raise ValueError(f"log_prob: expected [{len(chunk)}], one number an image, got {list(judgement.shape)}")
        judged = judgement.tolist()
        for value, seed, label, image in zip(judged, seeds, labels, images, strict=True):
            if math.isnan(value):
                raise ValueError(f"log_prob: expected numbers, got NaN for seed {seed} of class {label}")
            # A copy of the image alone: a view would keep the whole batch in memory.
            best[label] = sorted([*best[label], (value, seed, image.clone())], key=_order)[: counts[label]]
    kept = [(label, *entry) for label, entries in best.items() for entry in entries]
    return Kept(
        images=torch.stack([image for _, _, _, image in kept]),
        labels=[label for label, *_ in kept],
        seeds=[seed for _, _, seed, _ in kept],
        log_probs=[value for _, value, _, _ in kept],
    )


def _repeat(made: Mapping[int, int]) -> Iterator[int]:
    return itertools.chain.from_iterable(itertools.repeat(label, count) for label, count in made.items())


def _order(entry: tuple[float, int, Tensor]) -> tuple[float, int]:
    value, seed, _ = entry
    return -value, seed
