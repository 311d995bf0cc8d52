"""The order of samples is as promised."""

import numpy as np
import pytest
import torch

from ctm_fast.data import batch_indices, epoch_order


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (12, 4), (5, 13), (1, 4), (100, 7)])
def test_each_epoch_visits_each_sample_once(n, batch_size):
    epochs = 6
    steps = -(-n * epochs // batch_size)
    stream = torch.cat([batch_indices(n, batch_size, seed=3, step=step) for step in range(steps)])
    assert stream.dtype == torch.int64
    assert len(stream) == steps * batch_size
    for epoch in stream[: n * epochs].reshape(epochs, n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_batches_are_the_stream_of_epochs_cut():
    stream = np.concatenate([epoch_order(10, 5, epoch) for epoch in range(7)])
    for step in (0, 3, 16, 1):  # in any order: no state
        assert batch_indices(10, 4, seed=5, step=step).tolist() == stream[4 * step : 4 * step + 4].tolist()


def test_the_order_is_fixed_for_good():
    """Raw Philox words; a NumPy that ordered otherwise would break every resumed run."""
    assert epoch_order(10, 1, 2).tolist() == [2, 9, 0, 5, 1, 6, 8, 7, 3, 4]


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_place_is_equally_likely():
    """Where sample 0 lands in 4,000 epochs of 8: chi-squared with 7 degrees of freedom, 24.3 is its 99.9th centile."""
    places = np.bincount([int(np.argmin(epoch_order(8, 0, epoch))) for epoch in range(4000)], minlength=8)
    assert ((places - 500.0) ** 2 / 500).sum() < 24.3


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 4, 0, 0), "n"), ((4, 0, 0, 0), "batch_size"), ((4, 4, 0, -1), "step")]
)
def test_batch_indices_refuses(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected at least"):
        batch_indices(*arguments)
