"""Batches: a rank or a micro-batch has what the whole batch has at its positions."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctm_fast.data import ImageDataset
from ctm_fast.ops import Stream
from ctm_fast.training.batches import Batches

CPU = torch.device("cpu")


def batches(batch: int, seed: int = 3) -> Batches:
    """Eleven images, so that a batch straddles epochs, each with its number as its label."""
    images = torch.arange(11 * 3 * 4 * 4, dtype=torch.int64).remainder(251).to(torch.uint8).view(11, 3, 4, 4)
    return Batches(ImageDataset("numbers", images, torch.arange(11), 11), batch, seed, CPU, conditional=True, flip=True)


@given(
    cuts=st.lists(st.integers(0, 24), max_size=5),
    batch=st.integers(1, 24),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10_000),
)
@settings(deadline=None)
def test_any_split_sees_what_the_batch_sees(cuts: list[int], batch: int, seed: int, step: int) -> None:
    source = batches(batch, seed)
    ends = sorted({0, batch, *(min(cut, batch) for cut in cuts)})
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    x0, labels = source.at(step, slice(0, batch))
    assert labels is not None and len(x0) == batch
    assert torch.equal(torch.cat([source.at(step, part)[0] for part in parts]), x0)
    assert torch.equal(torch.cat([source.at(step, part)[1] for part in parts]), labels)
    for stream in (Stream.TRAIN, Stream.DSM):
        noise = source.noise(step, x0, stream, slice(0, batch))
        split = [source.noise(step, x0[part], stream, part) for part in parts]
        assert torch.equal(torch.cat(split), noise)


def test_images_keep_their_labels_and_half_are_mirrored() -> None:
    source = batches(1000)
    x0, labels = source.at(0, slice(0, 1000))
    assert labels is not None
    pixels = ((x0 + 1) * 127.5).round().to(torch.uint8)
    straight = (pixels == source.dataset.images[labels]).flatten(1).all(1)
    mirrored = (pixels == source.dataset.images[labels].flip(3)).flatten(1).all(1)
    assert (straight ^ mirrored).all()
    assert 430 < int(mirrored.sum()) < 570
    assert torch.equal(torch.bincount(labels, minlength=11).sort().values, torch.tensor([90] + [91] * 10))


@pytest.mark.parametrize("positions", [slice(4, 9), slice(0, 8, 2), slice(-2, 4)])
def test_positions_outside_of_the_batch(positions: slice) -> None:
    source = batches(8)
    with pytest.raises(ValueError, match="positions: expected slice"):
        source.at(0, positions)
    with pytest.raises(ValueError, match="positions: expected slice"):
        source.noise(0, torch.zeros(5, 3, 4, 4), Stream.TRAIN, positions)


def test_labels_are_dropped_by_position() -> None:
    source = replace(batches(24), label_dim=11, label_dropout=0.25)
    kept = 0.0
    for step in range(100):
        indices = batches(24).at(step, slice(0, 24))[1]
        x0, labels = source.at(step, slice(0, 24))
        assert indices is not None and labels is not None
        assert torch.equal(x0, batches(24).at(step, slice(0, 24))[0])
        assert torch.equal(torch.cat([source.at(step, part)[1] for part in (slice(0, 5), slice(5, 24))]), labels)
        rows = labels.sum(1)
        assert torch.equal(labels, torch.nn.functional.one_hot(indices, 11) * rows.unsqueeze(1))
        assert set(rows.tolist()) <= {0.0, 1.0}
        kept += float(rows.sum())
    assert abs(kept / 2400 - 0.75) < 4 * (0.75 * 0.25 / 2400) ** 0.5
