"""group_norm_silu as a block calls it, 32 groups and SiLU: an image read and one written; backward, two read and one
written. One case after another for the rates, and the ways in turns for the ratios."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import (
    BATCHES,
    COMPILED,
    CPP,
    DEVICE,
    EAGER,
    NETWORK_DTYPE,
    ROUNDS,
    TRITON,
    Call,
    Way,
    compare,
    every_direction,
    every_layout,
    every_way,
    images,
    rotation,
    time_op,
)
from ctm_fast.ops import group_norm_silu

IMAGES = [(256, 32, 32), (384, 32, 32), (512, 16, 16), (192, 64, 64)]
"""[C, H, W] inside the CIFAR-10 network, at its two resolutions of most work, and ImageNet-64's first."""


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: "x".join(map(str, image)))
@pytest.mark.parametrize("batch", BATCHES)
@every_layout
@every_direction
@every_way
def test_group_norm_silu(
    benchmark: BenchmarkFixture,
    way: Way,
    batch: int,
    image: tuple[int, int, int],
    layout: torch.memory_format,
    grad: bool,
) -> None:
    shape = (batch, *image)
    traffic = (5 if grad else 2) * images(shape, layout, dtype=NETWORK_DTYPE).nbytes
    time_op(benchmark, way, "group_norm_silu", call, lambda: make(shape, layout, grad), traffic=traffic)


@pytest.mark.parametrize("image", IMAGES[:2], ids=lambda image: "x".join(map(str, image)))
@every_direction
def test_in_turns(benchmark: BenchmarkFixture, image: tuple[int, int, int], grad: bool) -> None:
    """channels_last, as the networks compute."""
    shape = (BATCHES[0], *image)
    cotangent = images(shape, torch.channels_last, dtype=NETWORK_DTYPE)

    def timed(way: Way) -> Call:
        function, inputs = way.prepare(call), rotation(lambda: make(shape, torch.channels_last, grad))

        def run() -> object:
            arguments = next(inputs)
            out = function(*arguments)
            return torch.autograd.grad(out, arguments, cotangent) if grad else out

        return run

    calls = {way: timed(way) for way in (CPP, TRITON, EAGER, COMPILED)}
    compare(benchmark, calls, baseline=EAGER, serves=("group_norm_silu",), rounds=2 * ROUNDS)


def make(shape: tuple[int, ...], layout: torch.memory_format, grad: bool) -> tuple[Tensor, ...]:
    weight, bias = torch.randn(2, shape[1], device=DEVICE)
    return (
        images(shape, layout, dtype=NETWORK_DTYPE, grad=grad),
        weight.requires_grad_(grad),
        bias.requires_grad_(grad),
    )


def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, weight, bias, groups=32, silu=True)
