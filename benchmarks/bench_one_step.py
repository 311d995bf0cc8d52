"""One-step sampling from seeds to uint8 images, batch 1 to 2048: the sampler of production, warmed up (CUDA graphs) and
kernel by kernel, beside the network as the published code runs it, eagerly in half precision.

On a CPU a rehearsal with the digits' network; ``bench_sampler.py`` has the figures of a CPU.
"""

from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import DEVICE, NETWORK_DTYPE, Call, Way, compare, flops
from benchmarks.networks import DIGITS, FULL_SIZE
from benchmarks.plain_unet import plain
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.models import CTM, NetworkConfig, build_network
from ctm_fast.samplers import generate
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


def eager(config: NetworkConfig, batch: int) -> Call:
    """DDPM++ in PyTorch's own modules and NCHW; of ADM there are none here, so ours in plain PyTorch, channels_last."""
    model = student(config, HALF)
    if config.arch == "ddpmpp":
        model.net = plain(model.net).to(HALF)  # type: ignore[assignment]
    seeds, labels = torch.arange(batch, device=DEVICE), None
    if config.label_dim:
        labels = seeds % config.label_dim

    def call() -> Tensor:
        return to_pixels(generate(model, LEVELS, seeds, labels).clamp_(-1, 1)).cpu()

    return call


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step(benchmark: BenchmarkFixture, name: str, batch: int) -> None:
    config = NETWORKS[name]
    cold, warm = (Sampler(student(config, NETWORK_DTYPE), LEVELS, batch=batch) for _ in range(2))
    try:
        warm.warmup([batch])
        calls: dict[Way, Call] = {
            EAGER: eager(config, batch),
            KERNELS: lambda: cold(range(batch), output="uint8"),
            WARM: lambda: warm(range(batch), output="uint8"),
        }
        work = batch * flops(eager(config, 1))
        result = compare(benchmark, calls, baseline=EAGER, work=work)
    except torch.cuda.OutOfMemoryError as error:
        pytest.skip(f"{name} at batch {batch} does not fit into the GPU's memory: {error}")
    result.figures |= {f"images/s, {way}": batch / result.median(way) for way in result.times}
    benchmark.extra_info["figures"] = result.figures
