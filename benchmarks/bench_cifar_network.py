"""The CIFAR-10 DDPM++ network, 42.4 GFLOP an image, at full size: beside it PyTorch's own modules, its convolutions
alone as they are, and as PyTorch computes them.

Run it on an otherwise idle machine with as many threads as it has cores: ``CTM_FAST_BENCH_THREADS=2``.
"""

import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import (
    COMPILED,
    DEVICE,
    ROUNDS,
    Call,
    Way,
    check_agreement,
    check_serving,
    compare,
    flops,
    images,
    levels,
)
from benchmarks.plain_unet import plain
from ctm_fast.models import NetworkConfig, UNet, build_network

BATCH = 8
FUSED = Way("fused", None)
CONVOLUTIONS = Way("its convolutions", None)
DIRECT = Way("PyTorch's convolutions", "reference")
PLAIN_NCHW = Way("plain NCHW", "reference")
PLAIN_NHWC = Way("plain NHWC", "reference")


class Convolutions(TorchDispatchMode):
    """Notes every convolution, PyTorch's or ours, with its arguments, the input by shape and strides alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, torch.Size, tuple[int, ...], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name in ("aten::convolution", "ctm_fast::conv3x3"):
            self.calls.append((func, args[0].shape, args[0].stride(), args[1:]))
        return func(*args, **(kwargs or {}))


def one_by_one(call: Call) -> Call:
    """The convolutions of ``call`` alone, one after the other, on inputs of the same shapes and strides.

    Two inputs take turns where a shape occurs again: an input is no more in the cache than after a whole image pass.
    """
    with torch.no_grad(), Convolutions() as noted:
        call()
    inputs: dict[tuple[torch.Size, tuple[int, ...]], Any] = {}
    for _, shape, stride, _ in noted.calls:
        if (shape, stride) not in inputs:
            pair = [torch.empty_strided(shape, stride, device=DEVICE).normal_() for _ in range(2)]
            inputs[shape, stride] = itertools.cycle(pair)

    def run() -> Tensor:
        for function, shape, stride, rest in noted.calls:
            out = function(next(inputs[shape, stride]), *rest)
        return out

    return run


def network() -> UNet:
    """With weights of a size that lets every branch count: a fresh network's last layers are almost zero."""
    torch.manual_seed(0)
    net = build_network(NetworkConfig(), s_branch=True).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


@pytest.mark.skipif(DEVICE.type != "cpu", reason="bench_unet times the networks on a GPU")
def test_cifar_network(benchmark: BenchmarkFixture) -> None:
    net = network()
    nchw, nhwc = plain(net), plain(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images((BATCH, 3, 32, 32), torch.contiguous_format)
    x_last = x.contiguous(memory_format=torch.channels_last)
    t, s = levels(BATCH)
    with torch.no_grad():
        compiled = COMPILED.prepare(net)
        calls: dict[Way, Call] = {
            FUSED: lambda: net(x, t, s),
            PLAIN_NCHW: lambda: nchw(x, t, s),
            PLAIN_NHWC: lambda: nhwc(x_last, t, s),
            COMPILED: lambda: compiled(x, t, s),
        }
        truth = calls[PLAIN_NCHW]()
        for way, call in calls.items():
            with way.serving():
                check_agreement(call(), truth, 1e-4)
        for way in (CONVOLUTIONS, DIRECT):
            with way.serving():
                calls[way] = one_by_one(calls[FUSED])
        work = flops(calls[FUSED])
        check_serving(calls[FUSED], FUSED, "group_norm_silu", "noise_embed", "conv3x3")
        result = compare(benchmark, calls, baseline=DIRECT, work=work)
    if len(result.times[FUSED.name]) < ROUNDS:  # --benchmark-disable: one turn is no verdict
        return
    # How far plain modules are behind is the machine's: its convolutions may or may not mind NCHW. That the rest of the
    # network costs little beside them, and less than PyTorch's own modules make of it, is ours.
    assert result.ratio(FUSED.name) <= 1.12, f"{result}: more than PyTorch's convolutions' time and an eighth"
    for way in (PLAIN_NCHW, PLAIN_NHWC, COMPILED):
        assert not result.slower(FUSED.name, way.name), f"{result}: slower than {way.name}"
