"""The bet: how an op must be registered so that it pays inside a compiled U-Net. The first thing to run on a device.

``test_block``: one DDPM++ block (norm, SiLU, convolution, shift by the level, norm, SiLU, convolution, skip) between
``precond_input`` and ``precond_combine``, forward and backward:

    eager               what there is to gain
    compiled            plain PyTorch throughout, which Inductor fuses: the baseline
    compiled+cpp        the ops are opaque C++ / CUDA calls; the graph is cut before and after each
    compiled+triton     the ops are ``torch.library.triton_op``s, part of the graph, though fused with nothing

``test_boundary``: what a cut costs where there is something to fuse. An op that scales the image stands between
norm + SiLU and the addition of the skip, all of it bound by memory: Inductor runs through it in the pass it makes
anyway; any kernel of ours needs that pass cut in three. The cost is also given in copies of the image: an op pays only
if it wins back more than that, so ``group_norm_silu`` has to take its neighbours (shift, SiLU, skip) with it.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import (
    COMPILED,
    COMPILED_CPP,
    COMPILED_TRITON,
    DEVICE,
    EAGER,
    NETWORK_DTYPE,
    NETWORK_TOLERANCE,
    ROUNDS,
    Call,
    Way,
    compare,
    copy_bandwidth,
    every_direction,
    flops,
    images,
    levels,
)
from ctm_fast.nn import BlockStyle, GroupNorm, UNetBlock
from ctm_fast.ops import precond_combine, precond_input

SHAPE = (64, 256, 16, 16) if DEVICE.type == "cuda" else (4, 128, 16, 16)
"""[B, C, H, W]: the CIFAR-10 network's at 16x16; on a CPU a smaller one."""
EMB_CHANNELS = 4 * 128
WAYS = (EAGER, COMPILED, COMPILED_CPP, COMPILED_TRITON)


class PreconditionedBlock(nn.Module):
    """A network of one block: x [B, C, H, W], t, s [B], emb [B, EMB_CHANNELS] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = UNetBlock(channels, channels, EMB_CHANNELS, style=BlockStyle())

    def forward(self, x: Tensor, t: Tensor, s: Tensor, emb: Tensor) -> Tensor:
        return precond_combine(x, self.block(precond_input(x, t, dtype=NETWORK_DTYPE), emb), t, s)


class Boundary(nn.Module):
    """Norm and SiLU, an op that scales the image, and the skip: x [B, C, H, W], t [B] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + precond_input(functional.silu(self.norm(x)), t)


def calls(module: nn.Module, arguments: tuple[Tensor, ...]) -> dict[Way, Call]:
    """The module each way; with its backward pass where the first argument wants a gradient."""
    x = arguments[0]
    wanted = [x, *module.parameters()]
    cotangent = torch.randn_like(x)

    def call(way: Way) -> Call:
        run = way.prepare(module)
        if not x.requires_grad:
            return torch.no_grad()(lambda: run(*arguments))
        return lambda: torch.autograd.grad(run(*arguments), wanted, cotangent)[0]

    return {way: call(way) for way in WAYS}


@every_direction
def test_block(benchmark: BenchmarkFixture, grad: bool) -> None:
    module = PreconditionedBlock(SHAPE[1]).to(DEVICE)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its stubs
    x = images(SHAPE, torch.channels_last, grad=grad)
    arguments = (x, *levels(SHAPE[0]), torch.randn(SHAPE[0], EMB_CHANNELS, device=DEVICE))
    compare(
        benchmark,
        calls(module, arguments),
        baseline=COMPILED,
        serves=("precond_input", "precond_combine"),
        tolerance=NETWORK_TOLERANCE,
        work=(3 if grad else 1) * flops(lambda: module(*arguments)),
    )


@every_direction
@pytest.mark.parametrize("opaque", [COMPILED_CPP, COMPILED_TRITON], ids=lambda way: way.name)
def test_boundary(benchmark: BenchmarkFixture, grad: bool, opaque: Way) -> None:
    if reason := opaque.missing():
        pytest.skip(reason)
    x = images(SHAPE, torch.channels_last, grad=grad)
    ways = calls(Boundary(SHAPE[1]).to(DEVICE), (x, levels(SHAPE[0])[0]))
    result = compare(
        benchmark,
        {way: ways[way] for way in (COMPILED, opaque)},
        baseline=COMPILED,
        serves=("precond_input",),
        tolerance=1e-4,
        rounds=2 * ROUNDS,
    )
    cost = result.median(opaque.name) - result.median(COMPILED.name)
    result.figures["cost of the cut, us"] = cost * 1e6
    result.figures["in copies of the image"] = cost / (2 * x.nbytes / copy_bandwidth())
