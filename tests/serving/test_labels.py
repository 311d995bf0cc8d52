"""Classes as functions of seeds."""

import numpy as np
import pytest

from ctm_fast.ops import Stream
from ctm_fast.serving.labels import labels_of_seeds
from tests.ops.philox import words

SEEDS = [0, 1, 2, 7, 2**32, 2**63 - 1]


def test_in_turn() -> None:
    assert labels_of_seeds(SEEDS, 10) == [seed % 10 for seed in SEEDS]
    assert labels_of_seeds(SEEDS, 10, [7, 3, 3]) == [[7, 3, 3][seed % 3] for seed in SEEDS]


def test_without_classes_there_are_none() -> None:
    assert labels_of_seeds(SEEDS, 0) is None


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_random_is_the_first_word_of_the_seeds_stream(num_classes: int) -> None:
    expected = [words(seed, 0, 1, Stream.LABEL)[0] * num_classes // 2**32 for seed in SEEDS]
    assert labels_of_seeds(SEEDS, num_classes, "random") == expected
    assert [labels_of_seeds([seed], num_classes, "random") for seed in SEEDS] == [[label] for label in expected]


def test_random_is_uniform_and_independent_of_the_seeds_order() -> None:
    """Chi-square of 50,000 draws in 10 classes, and of neighbours in 100 pairs, within 4 standard deviations."""
    labels = np.array(labels_of_seeds(range(50_000), 10, "random"))
    for draws, classes in ((labels, 10), (labels[:-1] * 10 + labels[1:], 100)):
        counts = np.bincount(draws, minlength=classes)
        expected = len(draws) / classes
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - (classes - 1)) < 4 * (2 * (classes - 1)) ** 0.5


def test_no_two_streams_are_one() -> None:
    assert len(Stream.__members__) == len(set(Stream))
    assert labels_of_seeds([], 10, "random") == []
