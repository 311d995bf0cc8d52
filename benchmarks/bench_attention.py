"""attention at the sizes of the networks: our Triton kernels, each of PyTorch's, the formula eager and compiled."""

import warnings
from functools import partial
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.harness import BATCHES, DEVICE, EAGER, NETWORK_DTYPE, TRITON, Way, every_direction, time_op
from benchmarks.harness import images as random_images
from ctm_fast.ops import attention

CUDA = DEVICE.type == "cuda"
COMPILED = Way("compiled", "reference", compiled=True, mode="max-autotune-no-cudagraphs" if CUDA else None)
SDPA = [
    Way(f"sdpa-{name}", "sdpa", sdpa=backend)
    for name, backend in [
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ]
]
LARGEST_ON_CPU = 16e9
"""Operations of a forward pass: a tenth of a second and more."""


class Size(NamedTuple):
    """A layer of a network: ``side`` x ``side`` pixels, ``heads`` of ``head`` channels."""

    network: str
    side: int
    heads: int
    head: int

    def __str__(self) -> str:
        return f"{self.network}-{self.side**2}x{self.head}-{self.heads}heads"


SIZES = [
    Size("ddpmpp", 16, 1, 256),
    Size("ddpmpp", 8, 1, 256),
    Size("adm", 32, 6, 64),
    Size("adm", 16, 9, 64),
    Size("adm", 8, 12, 64),
    Size("large", 64, 1, 64),
]


def why_not(way: Way, qkv: Tensor, heads: int) -> str | None:
    """What PyTorch says of a kernel of its own that does not take this call; None where it takes it."""
    if way.sdpa is None:
        return None
    with warnings.catch_warnings(record=True) as told, way.serving():
        warnings.simplefilter("always")
        try:
            attention(qkv, heads=heads)
        except RuntimeError as error:
            return "; ".join([str(error), *(str(warning.message) for warning in told)]).replace("\n", " ")
    return None


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@every_direction
@pytest.mark.parametrize("way", [TRITON, EAGER, COMPILED, *SDPA], ids=lambda way: way.name)
def test_attention(benchmark: BenchmarkFixture, way: Way, size: Size, batch: int, grad: bool) -> None:
    tokens, channels = size.side**2, size.heads * size.head
    forward = 4 * batch * tokens**2 * channels  # q k^T and its product with v
    if not CUDA and forward > LARGEST_ON_CPU:
        pytest.skip(f"{forward / 1e9:.0f} GFLOP a forward pass are too many for a CPU")
    shape = (batch, 3 * channels, size.side, size.side)

    def make() -> tuple[Tensor, ...]:
        return (random_images(shape, torch.channels_last, dtype=NETWORK_DTYPE, grad=grad),)

    if reason := why_not(way, make()[0], size.heads):
        pytest.skip(reason)
    if CUDA and way.backend == "reference":
        scores = 4 * batch * size.heads * tokens**2
        copies = 6 if grad else 3
        memory = torch.cuda.get_device_properties(DEVICE).total_memory
        if 1.2 * copies * scores > memory:
            pytest.skip(f"{copies} matrices of scores, {scores / 1e9:.0f} GB each, exceed {memory / 1e9:.0f} GB")
    # Backward: q k^T again, and the four products of the gradients.
    time_op(
        benchmark,
        way,
        "attention",
        partial(attention, heads=size.heads),
        make,
        work=forward * 7 // 2 if grad else forward,
        tolerance=2e-2 if CUDA else None,
        checked=slice(8),
    )
