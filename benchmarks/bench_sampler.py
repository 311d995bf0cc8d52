"""The sampler of production with the CIFAR-10 DDPM++ network at full size, one step, from seeds to images.

On a CPU: images/s beside the same network in plain PyTorch modules, eager and NCHW, in turns; the latency of one image;
and what the sampler costs over the bare network. Run it on an otherwise idle machine with as many threads as it has
cores: ``CTM_FAST_BENCH_THREADS=2``.
"""

import time
from functools import cache

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.bench_cifar_network import network
from benchmarks.harness import DEVICE, ROUNDS, Call, Way, compare
from benchmarks.plain_unet import plain
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.models import CTM
from ctm_fast.ops import precond_combine, precond_input
from ctm_fast.samplers import initial_noise
from ctm_fast.serving import Sampler

BATCH = 8
CALLS = 200
LEVELS = Levels()
SAMPLER = Way("Sampler, warm", None)
COLD = Way("Sampler", None)
BARE = Way("network, packed", None)
AROUND = Way("Sampler around it", None)
PLAIN = Way("plain NCHW", "reference")
OVERHEAD = 0.02
"""Time over that of the bare network."""

on_a_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the figures of a GPU are bench_unet's and bench_sample's")


@cache
def model() -> CTM:
    return CTM(network().requires_grad_(False))


def warm(batch: int) -> Sampler:
    sampler = Sampler(model(), LEVELS)
    sampler.warmup([batch])
    return sampler


def plain_call(batch: int) -> Call:
    """One step as the published code runs it: eager, contiguous, float32, preconditioning by PyTorch's operators."""
    net = plain(model().net)
    x = initial_noise(torch.arange(batch), (3, 32, 32), LEVELS)
    t, s = torch.full((batch,), LEVELS.sigma_max), torch.full((batch,), LEVELS.sigma_min)

    @torch.no_grad()
    def call() -> Tensor:
        return precond_combine(x, net(precond_input(x, t), t, s), t, s).clamp(-1, 1)

    return call


@on_a_cpu
def test_throughput(benchmark: BenchmarkFixture) -> None:
    """Batch 8, float32, from seeds: images/s of the warm sampler over those of the plain modules."""
    sampler, cold = warm(BATCH), Sampler(model(), LEVELS)
    calls: dict[Way, Call] = {
        PLAIN: plain_call(BATCH),
        COLD: lambda: cold(range(BATCH)),
        SAMPLER: lambda: sampler(range(BATCH)),
    }
    result = compare(benchmark, calls, baseline=PLAIN, tolerance=1e-4)
    result.figures |= {f"images/s, {way}": BATCH / result.median(way) for way in result.times}
    result.figures["speed-up"] = 1 / result.ratio(SAMPLER.name)
    benchmark.extra_info["figures"] = result.figures
    if len(result.times[SAMPLER.name]) < ROUNDS:  # --benchmark-disable: one turn is no verdict
        return
    # How far plain modules are behind is the machine's; that a warm-up pays is ours.
    for way in (PLAIN, COLD):
        assert not result.slower(SAMPLER.name, way.name), f"{result}: slower than {way.name}"


@on_a_cpu
@pytest.mark.parametrize("batch", [1, BATCH])
def test_overhead(benchmark: BenchmarkFixture, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler around a network that answers at once: checks of the arguments, noise, preconditioning, clamp."""
    sampler = warm(batch)
    net = sampler._engine._serving.net
    x, t = torch.randn(batch, 3, 32, 32), torch.full((batch,), LEVELS.sigma_max)
    s = torch.full((batch,), LEVELS.sigma_min)
    forward = net.forward
    with torch.no_grad():
        answer = forward(x, t, s)
    monkeypatch.setattr(net, "forward", lambda *_: answer)

    @torch.no_grad()
    def bare() -> Tensor:
        return forward(x, t, s)

    calls: dict[Way, Call] = {BARE: bare, AROUND: lambda: sampler(range(batch))}
    result = compare(benchmark, calls, baseline=BARE)
    if len(result.times[AROUND.name]) < ROUNDS:
        return
    assert result.ratio(AROUND.name) <= OVERHEAD, f"{result}: expected at most {OVERHEAD}"


@on_a_cpu
def test_latency(benchmark: BenchmarkFixture) -> None:
    """One image, uint8: p50 and p99 of 200 calls."""
    sampler = warm(1)
    seconds: list[float] = []

    def call() -> None:
        begin = time.perf_counter()
        sampler([len(seconds)], output="uint8")
        seconds.append(time.perf_counter() - begin)

    benchmark.pedantic(call, rounds=CALLS, iterations=1, warmup_rounds=3)
    p50, p99 = np.quantile(seconds[-CALLS:], [0.5, 0.99])
    benchmark.extra_info["figures"] = {"p50 ms": 1e3 * p50, "p99 ms": 1e3 * p99}
    print(f"\none image: p50 {1e3 * p50:.1f} ms, p99 {1e3 * p99:.1f} ms over {len(seconds[-CALLS:])} calls")
