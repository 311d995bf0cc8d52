"""precond_combine: two images read and one written; backward, one read and two written."""

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Way, every_direction, every_layout, every_shape, every_way, images, levels, time_op
from ctm_fast.ops import precond_combine


@every_shape
@every_layout
@every_direction
@every_way
def test_precond_combine(
    benchmark: BenchmarkFixture, way: Way, shape: tuple[int, ...], layout: torch.memory_format, grad: bool
) -> None:
    def make() -> tuple[Tensor, ...]:
        return images(shape, layout, grad=grad), images(shape, layout, grad=grad), *levels(shape[0])

    traffic = (6 if grad else 3) * images(shape, layout).nbytes
    time_op(benchmark, way, "precond_combine", precond_combine, make, traffic=traffic)
