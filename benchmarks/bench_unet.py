"""Whole U-Nets as the jump G(x, t, s): compiled with fused ops against compiled in ``use_reference()``.

On a GPU the full-size networks of the paper as well; on a CPU small ones.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import (
    COMPILED,
    COMPILED_CPP,
    COMPILED_TRITON,
    DEVICE,
    EAGER,
    NETWORK_TOLERANCE,
    ROUNDS,
    Call,
    Way,
    check_default,
    compare,
    every_direction,
    flops,
    levels,
)
from benchmarks.harness import images as random_images
from benchmarks.networks import DEFAULTS, NETWORKS, build, labels

ACTIVATIONS = {"cifar10": 194, "imagenet64": 936}
"""MiB an image that a full-size network keeps for its backward pass, eager in bfloat16 (counted on a CPU)."""


@every_direction
@pytest.mark.parametrize("name", NETWORKS)
def test_unet(benchmark: BenchmarkFixture, name: str, grad: bool) -> None:
    if grad and DEVICE.type == "cpu" and name != "digits":
        pytest.skip("on a CPU training compiles no backward pass (training/regions.py): it takes minutes to compile")
    config, batch = NETWORKS[name]
    needed = ACTIVATIONS.get(name.rpartition("-")[0], 0) * batch / 1024
    if grad and needed > 0.8 * memory_gib():
        pytest.skip(f"{needed:.0f} GiB of activations do not fit into this GPU's memory")
    model = build(name)
    shape = (batch, config.img_channels, config.img_resolution, config.img_resolution)
    x = random_images(shape, torch.contiguous_format)
    cotangent = torch.randn_like(x)
    arguments = (x, *levels(batch), labels(name, batch))
    parameters = list(model.parameters())

    def call(way: Way) -> Call:
        jump = way.prepare(model.jump)
        if not grad:
            return torch.no_grad()(lambda: jump(*arguments))
        return lambda: torch.autograd.grad(jump(*arguments), parameters, cotangent)[-1]

    # Each way costs its compilation, with a gradient minutes: there, the defaults are one of the others.
    defaults = [] if grad else [DEFAULTS]
    ways = [EAGER, COMPILED, COMPILED_CPP, COMPILED_TRITON, *defaults]
    result = compare(
        benchmark,
        {way: call(way) for way in ways},
        baseline=COMPILED,
        serves=("precond_input", "noise_embed", "precond_combine"),
        tolerance=NETWORK_TOLERANCE,
        work=(3 if grad else 1) * flops(lambda: model.jump(*arguments)),
        rounds=ROUNDS if grad else 2 * ROUNDS,
    )
    for way in defaults:
        check_default(result, way)


def memory_gib() -> float:
    """Of the GPU; without end on a CPU, where no network is large."""
    return torch.cuda.get_device_properties(DEVICE).total_memory / 2**30 if DEVICE.type == "cuda" else float("inf")
