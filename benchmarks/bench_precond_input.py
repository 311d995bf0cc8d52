"""precond_input: one image read and one written, in the dtype of the network (float32 here); backward the same."""

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Way, every_direction, every_layout, every_shape, every_way, images, levels, time_op
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

    traffic = (4 if grad else 2) * images(shape, layout).nbytes
    time_op(benchmark, way, "precond_input", precond_input, make, traffic=traffic)
