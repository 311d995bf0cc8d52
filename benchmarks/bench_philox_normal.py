"""philox_normal: nothing read, one image batch written. Bound by arithmetic wherever memory is fast."""

from functools import partial

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import DEVICE, Way, every_layout, every_shape, every_way, images, time_op
from ctm_fast.ops import Stream, philox_normal


@every_shape
@every_layout
@every_way
def test_philox_normal(
    benchmark: BenchmarkFixture, way: Way, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    def make() -> tuple[Tensor, ...]:
        return (torch.randint(2**62, shape[:1], device=DEVICE),)

    draw = partial(philox_normal, step=3, shape=shape[1:], stream=Stream.RENOISE, memory_format=layout)
    time_op(benchmark, way, "philox_normal", draw, make, traffic=images(shape, layout).nbytes)
