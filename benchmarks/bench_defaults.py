"""The gate of ``SERVES`` in ``ctm_fast/ops/_library.py``: no default is slower than its alternative.

Each op alone, called eagerly, and compiled with its edge: what surrounds it in the networks and could be fused with it.
Convolutions and matrix products are left out, because no op is fused with one of those; they would only hide the
difference.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import (
    COMPILED,
    COMPILED_CPP,
    COMPILED_TRITON,
    CPP,
    DEVICE,
    EAGER,
    NETWORK_DTYPE,
    ROUNDS,
    SHAPES,
    TRITON,
    Call,
    Way,
    check_default,
    compare,
    images,
    levels,
    rotation,
)
from ctm_fast.ops import (
    Stream,
    gamma_step,
    group_norm_silu,
    noise_embed,
    noise_frequencies,
    philox_normal,
    precond_combine,
    precond_input,
    serving,
)

FREQUENCIES = noise_frequencies(128, endpoint=True).to(DEVICE)


class Edge(NamedTuple):
    function: Callable[..., Tensor]
    make: Callable[[tuple[int, ...]], tuple[Tensor, ...]]
    """Shape [B, C, H, W] -> the arguments."""


def _image(shape: tuple[int, ...]) -> Tensor:
    return images(shape, torch.contiguous_format)


def _output(shape: tuple[int, ...]) -> Tensor:
    """As a network returns it: it computes in channels_last."""
    return images(shape, torch.channels_last, dtype=NETWORK_DTYPE)


def _seeds(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(2**62, shape[:1], device=DEVICE)


def _embed(t: Tensor, s: Tensor, label: Tensor) -> Tensor:
    features, features_s = noise_embed(t, s, freqs=FREQUENCIES)
    return torch.cat([features + label, features_s + label])


def _feature(shape: tuple[int, ...]) -> Tensor:
    """Inside the network, where an image has 256 channels: of an eighth of the batch, at least one."""
    batch, _, height, width = shape
    return images((max(1, batch // 8), 256, height, width), torch.channels_last)


def _normalise(skip: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What lies between two convolutions: the end of a residual block, and the norm at the start of the next."""
    return group_norm_silu((skip + h) * 0.5**0.5, weight, bias, groups=32)


EDGES = {
    "precond_input": Edge(
        lambda x, t: precond_input(x, t, dtype=NETWORK_DTYPE).contiguous(memory_format=torch.channels_last),
        lambda shape: (_image(shape), levels(shape[0])[0]),
    ),
    "precond_combine": Edge(precond_combine, lambda shape: (_image(shape), _output(shape), *levels(shape[0]))),
    "noise_embed": Edge(
        _embed,
        lambda shape: (*levels(shape[0]), torch.randn(shape[0], 2 * len(FREQUENCIES), device=DEVICE)),
    ),
    "philox_normal": Edge(
        lambda x0, t, seeds: x0 + t.view(-1, 1, 1, 1) * philox_normal(seeds, 3, x0.shape[1:], stream=Stream.TRAIN),
        lambda shape: (_image(shape), levels(shape[0])[0], _seeds(shape)),
    ),
    "gamma_step": Edge(
        lambda x, F_x, t, s, seeds: gamma_step(x, F_x, t, s, t, seeds, 3),
        lambda shape: (_image(shape), _output(shape), *levels(shape[0]), _seeds(shape)),
    ),
    "group_norm_silu": Edge(
        _normalise,
        lambda shape: (_feature(shape), _feature(shape), *torch.randn(2, 256, device=DEVICE)),
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(
    "ways", [(EAGER, CPP, TRITON), (COMPILED, COMPILED_CPP, COMPILED_TRITON)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("op", EDGES)
def test_default(benchmark: BenchmarkFixture, op: str, ways: tuple[Way, ...], shape: tuple[int, ...]) -> None:
    edge = EDGES[op]

    def call(way: Way) -> Call:
        function, inputs = way.prepare(edge.function), rotation(lambda: edge.make(shape))
        return lambda: function(*next(inputs))

    result = compare(benchmark, {way: call(way) for way in ways}, baseline=ways[0], serves=(op,), rounds=2 * ROUNDS)
    serves = serving(op, DEVICE.type, compiling=ways[0].compiled)
    check_default(result, next(way for way in ways if way.backend == serves))
