"""precond_combine: two images read and one written; backward, one read and two written. F_x in the network's dtype."""

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import (
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
from ctm_fast.ops import precond_combine


@every_shape
@every_layout
@every_direction
@every_way
def test_precond_combine(
    benchmark: BenchmarkFixture, way: Way, shape: tuple[int, ...], layout: torch.memory_format, grad: bool
) -> None:
    def make() -> tuple[Tensor, ...]:
        F_x = images(shape, layout, grad=grad, dtype=NETWORK_DTYPE)
        return images(shape, layout, grad=grad), F_x, *levels(shape[0])

    x, F_x = make()[:2]
    traffic = (2 if grad else 1) * (2 * x.nbytes + F_x.nbytes)
    time_op(benchmark, way, "precond_combine", precond_combine, make, traffic=traffic)
