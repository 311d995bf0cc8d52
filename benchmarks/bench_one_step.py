"""One-step sampling from seeds to uint8 images, batch 1 to 2048: the sampler of production, warmed up (CUDA graphs) and
kernel by kernel, beside the network as the published code runs it, eagerly in half precision.

On a CPU a rehearsal with the digits' network; ``bench_sampler.py`` has the figures of a CPU.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import (
    DEVICE,
    NETWORK_DTYPE,
    NETWORK_TOLERANCE,
    Call,
    Way,
    check_agreement,
    check_serving,
    compare,
    flops,
)
from benchmarks.networks import DIGITS, FULL_SIZE
from benchmarks.plain_unet import plain
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.models import CTM, NetworkConfig, build_network
from ctm_fast.samplers import initial_noise
from ctm_fast.serving import Sampler
from ctm_fast.serving.pixels import to_pixels

ON_A_GPU = DEVICE.type == "cuda"
NETWORKS: dict[str, NetworkConfig] = FULL_SIZE if ON_A_GPU else {"digits": replace(DIGITS.network, label_dim=0)}
BATCHES = (1, 8, 64, 512, 2048) if ON_A_GPU else (1, 8)
HALF = torch.float16 if ON_A_GPU else torch.float32
EAGER = Way("eager, half precision", "reference")
KERNELS = Way("Sampler", None)
WARM = Way("Sampler, warm", None)
LEVELS = Levels()


def student(config: NetworkConfig, dtype: torch.dtype) -> CTM:
    """The same random weights at every call, of a size that lets every branch count."""
    torch.manual_seed(0)
    net = build_network(config, s_branch=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return CTM(net.requires_grad_(False), DIGITS.sigma_data, dtype=dtype).to(DEVICE).eval()


def eager(config: NetworkConfig, batch: int) -> Callable[[], Tensor]:
    """Float images by DDPM++ in PyTorch's own modules and NCHW; of ADM there are none, so ours in plain PyTorch."""
    model = student(config, HALF)
    if config.arch == "ddpmpp":
        model.net = plain(model.net).to(HALF)  # type: ignore[assignment]
    seeds = torch.arange(batch, device=DEVICE)
    labels = seeds % config.label_dim if config.label_dim else None
    x_T = initial_noise(seeds, (config.img_channels, config.img_resolution, config.img_resolution), LEVELS)
    t, s = (torch.full((batch,), level, device=DEVICE) for level in (LEVELS.sigma_max, LEVELS.sigma_min))

    @torch.no_grad()
    def call() -> Tensor:
        return model.jump(x_T, t, s, labels).clamp_(-1, 1)

    return call


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step(benchmark: BenchmarkFixture, name: str, batch: int) -> None:
    config = NETWORKS[name]
    cold, warm = (Sampler(student(config, NETWORK_DTYPE), LEVELS, batch=batch) for _ in range(2))
    try:
        warm.warmup([batch])
        plainly = eager(config, batch)
        with EAGER.serving():
            truth = plainly()
        for sampler in (cold, warm):
            images = sampler(range(batch))
            assert isinstance(images, Tensor)
            check_agreement(images, truth, NETWORK_TOLERANCE)
        calls: dict[Way, Call] = {
            EAGER: lambda: to_pixels(plainly()).cpu(),
            KERNELS: lambda: cold(range(batch), output="uint8"),
            WARM: lambda: warm(range(batch), output="uint8"),
        }
        check_serving(calls[KERNELS], KERNELS, "group_norm_silu")  # a graph's replay dispatches nothing
        work = batch * flops(eager(config, 1))
        result = compare(benchmark, calls, baseline=EAGER, work=work)
    except torch.cuda.OutOfMemoryError as error:
        pytest.skip(f"{name} at batch {batch} does not fit into the GPU's memory: {error}")
    result.figures |= {f"images/s, {way}": batch / result.median(way) for way in result.times}
    benchmark.extra_info["figures"] = result.figures
