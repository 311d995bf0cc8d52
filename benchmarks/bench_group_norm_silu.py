"""group_norm_silu as a block calls it, 32 groups and SiLU: an image read and one written; backward, two read and one
written."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import DEVICE, Way, every_direction, every_layout, every_way, images, time_op
from ctm_fast.ops import group_norm_silu

BATCHES = (64, 512) if DEVICE.type == "cuda" else (8,)
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

    def make() -> tuple[Tensor, ...]:
        weight, bias = torch.randn(2, image[0], device=DEVICE)
        return images(shape, layout, grad=grad), weight.requires_grad_(grad), bias.requires_grad_(grad)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, groups=32, silu=True)

    traffic = (5 if grad else 2) * images(shape, layout).nbytes
    time_op(benchmark, way, "group_norm_silu", call, make, traffic=traffic)
