"""precond_input: one image read and one written, in the dtype of the network; backward the same."""

from functools import partial

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
from ctm_fast.ops import precond_input


@every_shape
@every_layout
@every_direction
@every_way
def test_precond_input(
    benchmark: BenchmarkFixture, way: Way, shape: tuple[int, ...], layout: torch.memory_format, grad: bool
) -> None:
    def make() -> tuple[Tensor, ...]:
        return images(shape, layout, grad=grad), levels(shape[0])[0]

    x = images(shape, layout)
    traffic = (2 if grad else 1) * (x.nbytes + x.to(NETWORK_DTYPE).nbytes)
    time_op(benchmark, way, "precond_input", partial(precond_input, dtype=NETWORK_DTYPE), make, traffic=traffic)
