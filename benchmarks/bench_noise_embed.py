"""noise_embed of t and s, 128 features each: a few kilobytes, so that what counts is the cost of a call."""

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import BATCHES, DEVICE, Way, every_way, levels, time_op
from ctm_fast.ops import noise_embed, noise_frequencies

CHANNELS = 128


def embed(t: Tensor, s: Tensor, *, freqs: Tensor) -> Tensor:
    return torch.stack(noise_embed(t, s, freqs=freqs))


@pytest.mark.parametrize("batch", BATCHES)
@every_way
def test_noise_embed(benchmark: BenchmarkFixture, way: Way, batch: int) -> None:
    freqs = noise_frequencies(CHANNELS, endpoint=True).to(DEVICE)
    traffic = 4 * (2 * batch + CHANNELS // 2 + 2 * batch * CHANNELS)
    time_op(benchmark, way, "noise_embed", partial(embed, freqs=freqs), lambda: levels(batch), traffic=traffic)
