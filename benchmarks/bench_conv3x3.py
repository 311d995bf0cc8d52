"""conv3x3 as the networks call it on a CPU, in channels_last: with weights transformed at each call, and once.

Beside them PyTorch's convolution, with weights as they are and packed by oneDNN. GFLOP are those of a direct one.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.functional import conv2d

from benchmarks.harness import (
    COMPILED,
    CPP,
    DEVICE,
    EAGER,
    Call,
    Way,
    check_agreement,
    check_default,
    compare,
    every_direction,
    flops,
    images,
    rotation,
)
from ctm_fast.models.prepacked import OneDNNConv2d, WinogradConv2d
from ctm_fast.nn import Conv2d
from ctm_fast.ops import conv3x3, serving
from ctm_fast.ops.conv3x3 import FEWEST_TILES

SIZES = [(8, 256, 256, 32), (8, 256, 256, 16), (8, 512, 256, 16), (1, 256, 256, 32), (1, 256, 256, 8), (64, 32, 32, 8)]
"""[B, C, K, side] in the CIFAR-10 network, at its batch of production and at one image, and in the digits'."""
PACKED, ONEDNN = Way("packed", "cpp"), Way("oneDNN, packed", "reference")
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="cuDNN serves on a GPU")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@every_direction
def test_in_turns(benchmark: BenchmarkFixture, size: tuple[int, int, int, int], grad: bool) -> None:
    batch, inputs, outputs, side = size
    weight = images((outputs, inputs, 3, 3), torch.channels_last, grad=grad)
    cotangent = images((batch, outputs, side, side), torch.channels_last)
    made = rotation(lambda: (images((batch, inputs, side, side), torch.channels_last, grad=grad),))

    def timed(way: Way) -> Call:
        function = way.prepare(conv3x3)

        def run() -> object:
            (x,) = next(made)
            out = function(x, weight)
            return torch.autograd.grad(out, (x, weight), cotangent) if grad else out

        return run

    (x,) = next(made)
    with torch.no_grad():
        truth = conv2d(x.double(), weight.double(), padding=1)
        with CPP.serving():
            check_agreement(conv3x3(x, weight), truth, TOLERANCE)
    calls = {way: timed(way) for way in (CPP, EAGER, COMPILED)}
    work = (3 if grad else 1) * flops(lambda: conv3x3(cotangent[:, :1].expand(-1, inputs, -1, -1), weight))
    result = compare(benchmark, calls, baseline=EAGER, serves=("conv3x3",), work=work)
    few = batch * (side // 4) ** 2 < FEWEST_TILES
    check_default(result, EAGER if few or serving("conv3x3", "cpu") == "reference" else CPP)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_packed_in_turns(benchmark: BenchmarkFixture, size: tuple[int, int, int, int]) -> None:
    batch, inputs, outputs, side = size
    conv = Conv2d(inputs, outputs, 3)
    made = rotation(lambda: (images((batch, inputs, side, side), torch.channels_last),))

    def timed(module: nn.Module) -> Call:
        @torch.no_grad()
        def run() -> Tensor:
            out: Tensor = module(*next(made))
            return out

        return run

    modules = {
        PACKED: WinogradConv2d(conv),
        ONEDNN: OneDNNConv2d(conv, [batch, inputs, side, side], torch.float32),
        EAGER: conv,
    }
    (x,) = next(made)
    with torch.no_grad():
        assert conv.bias is not None
        truth = conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        for way, module in modules.items():
            with way.serving():
                check_agreement(module(x), truth, TOLERANCE)
    calls = {way: timed(module) for way, module in modules.items()}
    work = flops(calls[EAGER])
    result = compare(benchmark, calls, baseline=ONEDNN, serves=("conv3x3_packed",), work=work)
    assert not result.slower(PACKED.name, ONEDNN.name) or serving("conv3x3_packed", "cpu") == "reference", f"{result}"
