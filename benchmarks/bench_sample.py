"""Sampling from seeds to images: one step, and four steps of gamma-sampling at gamma = 0.5.

The network is compiled; the ops around it (initial noise, ``precond_input``, jump, jump with noise) are called one by
one, eagerly, as a sampler does.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import COMPILED, DEVICE, EAGER, Call, Way, check_default, compare
from benchmarks.networks import DEFAULTS, DIGITS, NETWORKS, build, labels
from ctm_fast.samplers import generate


@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.0), (4, 0.5)], ids=["1-step", "4-steps"])
def test_sample(benchmark: BenchmarkFixture, steps: int, gamma: float) -> None:
    batch = NETWORKS["digits"][1]
    seeds, classes = torch.arange(batch, device=DEVICE), labels("digits", batch)

    def call(way: Way) -> Call:
        model = build("digits")
        if way.compiled:
            model.net.compile(fullgraph=True, dynamic=False)

        def sample() -> Tensor:
            return generate(model, DIGITS.levels, seeds, classes, steps=steps, gamma=gamma)

        return sample

    calls = {way: call(way) for way in (EAGER, COMPILED, DEFAULTS)}
    result = compare(benchmark, calls, baseline=COMPILED, tolerance=1e-2)
    check_default(result, DEFAULTS)
