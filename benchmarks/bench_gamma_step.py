"""gamma_step: two images read and one written, the noise made on the way; backward, one read and two written.

On a CPU it is bound by the arithmetic of the noise, not by the memory: the share of the copy says how far.
"""

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import (
    DEVICE,
    NETWORK_DTYPE,
    Way,
    every_direction,
    every_layout,
    every_shape,
    every_way,
    images,
    levels,
    time_op,
)
from ctm_fast.ops import gamma_step


def step(x: Tensor, F_x: Tensor, t: Tensor, s: Tensor, seeds: Tensor) -> Tensor:
    return gamma_step(x, F_x, t, s, t, seeds, 3)


@every_shape
@every_layout
@every_direction
@every_way
def test_gamma_step(
    benchmark: BenchmarkFixture, way: Way, shape: tuple[int, ...], layout: torch.memory_format, grad: bool
) -> None:
    def make() -> tuple[Tensor, ...]:
        seeds = torch.arange(shape[0], device=DEVICE)
        F_x = images(shape, layout, grad=grad, dtype=NETWORK_DTYPE)
        return images(shape, layout, grad=grad), F_x, *levels(shape[0]), seeds

    x, F_x = make()[:2]
    traffic = (2 if grad else 1) * (2 * x.nbytes + F_x.nbytes)
    time_op(benchmark, way, "gamma_step", step, make, traffic=traffic)
