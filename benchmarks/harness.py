"""How everything in this folder is timed; README.md beside it says how to read the figures."""

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ctm_fast import ops
from ctm_fast.ops._library import Backend, unavailable, use_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20
ROUND_SECONDS = 2e-3
"""A round calls often enough to last this long: a clock read and a synchronisation are then nothing."""
NOISE = 1.10
"""A ratio up to this is noise."""

Call = Callable[[], Any]


class Way(NamedTuple):
    """One way to run the same computation: whose kernels serve, and whether ``torch.compile`` has it."""

    name: str
    backend: Backend | None
    """None: the defaults, ``SERVES`` in ``ctm_fast/ops/_library.py``."""
    compiled: bool = False
    mode: str | None = None
    """Of ``torch.compile``."""
    sdpa: SDPBackend | None = None
    """Which of PyTorch's kernels, where ``backend`` is "sdpa"; it raises where it does not take a call."""

    def missing(self) -> str | None:
        """Why it cannot be timed on this device, in words; None where it can."""
        if self.backend in (None, "reference"):
            return None
        return unavailable(self.backend, DEVICE.type)

    def serving(self) -> AbstractContextManager[Any]:
        """Open around every call, the first included: a compiled function is recompiled where this changes."""
        stack = ExitStack()
        if self.backend is not None:
            stack.enter_context(use_backend(self.backend))
        if self.sdpa is not None:
            stack.enter_context(sdpa_kernel(self.sdpa))
        return stack

    def prepare(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False, mode=self.mode) if self.compiled else function

    def served_by(self, op: str) -> Backend:
        return self.backend or ops.serving(op, DEVICE.type, compiling=self.compiled)


CPP = Way("cpp", "cpp")
TRITON = Way("triton", "triton")
EAGER = Way("eager", "reference")
COMPILED = Way("compiled", "reference", compiled=True)
COMPILED_CPP = Way("compiled+cpp", "cpp", compiled=True)
COMPILED_TRITON = Way("compiled+triton", "triton", compiled=True)
WAYS = (CPP, TRITON, EAGER, COMPILED, COMPILED_CPP, COMPILED_TRITON)

NETWORK_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""What the networks compute in; images at a noise level stay in float32."""
BATCHES = (64, 512) if DEVICE.type == "cuda" else (8,)
SHAPES = [(batch, 3, size, size) for size in (32, 64) for batch in BATCHES]
"""[B, C, H, W]: the images of the CIFAR-10 and ImageNet-64 networks."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
"""Of an op against its reference: the last digits of float32, or two neighbours among bfloat16's numbers."""
NETWORK_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}[NETWORK_DTYPE]
"""Of a network or block against the same by other kernels: what rounding has become after all its layers."""

every_way = pytest.mark.parametrize("way", [CPP, TRITON, EAGER, COMPILED], ids=lambda way: way.name)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
every_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
every_direction = pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward+backward"])


def images(
    shape: tuple[int, ...], layout: torch.memory_format, *, grad: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normals [B, C, H, W]."""
    return torch.randn(shape, device=DEVICE).to(dtype, memory_format=layout).requires_grad_(grad)


def levels(batch: int) -> tuple[Tensor, Tensor]:
    """(t, s) [B], 0.002 <= s <= t <= 80."""
    t = 0.002 * 40000 ** torch.rand(batch, device=DEVICE)
    return t, 0.002 + (t - 0.002) * torch.rand(batch, device=DEVICE)


def seconds() -> float:
    """The clock: waits for the device, so that a round's time is the device's."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(call: Call, rounds: int) -> float:
    """The fastest of ``rounds`` calls after the first: a ceiling is what the machine can do when left alone."""
    call()
    times = []
    for _ in range(rounds):
        begin = seconds()
        call()
        times.append(seconds() - begin)
    return min(times)


@cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy far larger than the cache, at these threads."""
    source = torch.randn(2**28 if DEVICE.type == "cuda" else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), 9)


@cache
def matmul_rate() -> float:
    """Operations per second of a large matrix product of random numbers in NETWORK_DTYPE, at these threads."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=DEVICE).to(NETWORK_DTYPE)
    return 2 * size**3 / best_seconds(lambda: a @ b, 9)


@cache
def convolution_rate() -> float:
    """Operations per second of a large 3x3 convolution of random numbers in NETWORK_DTYPE, at these threads."""
    batch = 512 if DEVICE.type == "cuda" else 4
    x = images((batch, 256, 32, 32), torch.channels_last, dtype=NETWORK_DTYPE)
    weight = images((256, 256, 3, 3), torch.channels_last, dtype=NETWORK_DTYPE)
    return flops(lambda: conv2d(x, weight)) / best_seconds(lambda: conv2d(x, weight), 9)


def product_rate() -> float:
    """The faster of the two: their libraries differ, by two on some CPUs."""
    return max(matmul_rate(), convolution_rate())


@cache
def cache_bytes() -> int:
    """The largest cache between a core and the memory."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(DEVICE).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=2**26)


def rotation(make: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Endless inputs, as many different ones as it takes to find none of them in the cache again."""
    first = make()
    nbytes = sum(tensor.nbytes for tensor in first)
    count = min(max(2, math.ceil(2 * cache_bytes() / nbytes)), 1024)
    return itertools.cycle([first, *(make() for _ in range(count - 1))])


def flops(call: Call) -> int:
    """Operations of the matrix products and direct convolutions of one call; its backward pass has twice as many."""
    with ops.use_reference(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def check_serving(call: Call, way: Way, *names: str) -> None:
    """Fail unless the kernels that ``way`` names serve ops ``names`` in ``call``: nothing else is worth timing.

    A Triton kernel or PyTorch's attention inside ``torch.compile`` is part of the graph and is not seen being
    dispatched; there it is ``use_backend`` that raises where it is missing.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    dispatched = {event.name for event in profiled.events()}
    for name in names:
        backend = way.served_by(name)
        seen: dict[Backend, str] = {"cpp": f"ctm_fast::{name}", "triton": f"ctm_fast_triton::{name}"}
        if name == "attention":
            seen["sdpa"] = "aten::scaled_dot_product_attention"
        inlined = way.compiled and backend != "cpp"
        expected = {seen[backend]} if backend in seen and not inlined else set()
        found = dispatched & set(seen.values())
        assert found == expected, f"{way.name}: expected {backend} to serve {name}, but {found or 'no op'} was called"


def check_agreement(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless the figures to be timed are right: max|actual - expected| <= tolerance max|expected|."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2g} of the largest value; nothing was timed"


def time_op(
    benchmark: BenchmarkFixture,
    way: Way,
    op: str,
    function: Callable[..., Tensor],
    make: Callable[[], tuple[Tensor, ...]],
    *,
    traffic: int = 0,
    work: int = 0,
    tolerance: float | None = None,
    checked: slice = slice(None),
) -> None:
    """Time ``function``, which calls op ``op``, on inputs from ``make``; backward too where an input wants a gradient.

    Args:
        traffic: bytes that must be read and written, for the share of :func:`copy_bandwidth`; or
        work: operations of products, for the share of :func:`product_rate`.
        tolerance: of the output, against the reference; by default that of its dtype.
        checked: the samples that are held to it, where the reference has no memory for all.
    """
    if bool(traffic) == bool(work):
        raise ValueError(f"expected traffic or work, got {traffic} bytes and {work} operations")
    if reason := way.missing():
        pytest.skip(reason)
    benchmark.group = re.sub(rf"\b{way.name}\b-?", "", benchmark.name)
    inputs = rotation(make)
    timed = way.prepare(function)
    with way.serving():
        arguments = next(inputs)
        out = timed(*arguments)
        with ops.use_reference(), torch.no_grad():
            expected = function(*(argument[checked] for argument in arguments))
            check_agreement(out[checked], expected, tolerance or TOLERANCE[out.dtype])
        backward = out.requires_grad
        cotangents = rotation(lambda: (torch.randn_like(out),)) if backward else None

        def call() -> Tensor | tuple[Tensor, ...]:
            arguments = next(inputs)
            out = timed(*arguments)
            if cotangents is None:
                return out
            return torch.autograd.grad(out, [x for x in arguments if x.requires_grad], next(cotangents))

        check_serving(call, way, op)
        iterations = max(1, round(ROUND_SECONDS / best_seconds(call, 5)))
        benchmark.pedantic(call, rounds=ROUNDS, iterations=iterations, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable: called once, not timed
        return
    rate = (traffic or work) / benchmark.stats.stats.median
    ceiling = copy_bandwidth() if traffic else product_rate()
    unit, scale, which = ("GB/s", 1e9, "copy") if traffic else ("TFLOP/s", 1e12, "ceiling")
    benchmark.extra_info.update(
        {"way": way.name, unit: rate / scale, f"{which} {unit}": ceiling / scale, "share": rate / ceiling}
    )


@dataclass
class Comparison:
    """Seconds per call of several ways, taken in turns: what disturbs one disturbs the next as well."""

    name: str
    baseline: str
    times: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Way -> why it was not timed."""
    figures: dict[str, float] = field(default_factory=dict)

    def median(self, way: str) -> float:
        return statistics.median(self.times[way])

    def ratios(self, way: str, other: str) -> list[float]:
        """Time of ``way`` over that of ``other``, round by round."""
        return [a / b for a, b in zip(self.times[way], self.times[other], strict=True)]

    def ratio(self, way: str) -> float:
        """To the baseline; below 1 is faster."""
        return statistics.median(self.ratios(way, self.baseline))

    def slower(self, way: str, other: str) -> bool:
        """Whether ``way`` takes longer than ``other`` beyond noise, in the median turn and best against best.

        A neighbour's load shifts the one or the other, seldom both; a slower kernel shifts both.
        """
        best = min(self.times[way]) / min(self.times[other])
        return best > NOISE and statistics.median(self.ratios(way, other)) > NOISE

    def __str__(self) -> str:
        timed = ", ".join(f"{way} {self.median(way) * 1e3:.3g} ms ({self.ratio(way):.2f})" for way in self.times)
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        skipped = ", ".join(f"{way} not timed: {reason}" for way, reason in self.left_out.items())
        return f"{self.name}: " + "; ".join(filter(None, (timed, figures, skipped)))


COMPARISONS: list[Comparison] = []
"""Of this session, for the summary at its end."""


def compare(
    benchmark: BenchmarkFixture,
    calls: dict[Way, Call],
    *,
    baseline: Way,
    serves: tuple[str, ...] = (),
    tolerance: float | None = None,
    work: int = 0,
    rounds: int = ROUNDS,
) -> Comparison:
    """Time ``calls`` in turns, A B C, C B A, ..., each under its way; a way that is missing here is left out by name.

    Args:
        calls: each returns what the baseline's returns, a tensor if ``tolerance`` is to hold between them.
        serves: ops that the way's kernels must serve in each call.
        work: operations of one call, for the share of :func:`product_rate`.

    What pytest-benchmark times is a whole turn; the ways are in ``extra_info``.
    """
    result = Comparison(benchmark.name, baseline.name)
    result.left_out = {way.name: reason for way in calls if (reason := way.missing())}
    ways = [way for way in calls if way.name not in result.left_out]
    counts = {}
    for way in ways:
        with way.serving():
            check_serving(calls[way], way, *serves)
            if tolerance is not None:
                found = calls[way]()
                with baseline.serving():
                    check_agreement(found, calls[baseline](), tolerance)
            counts[way] = max(1, round(ROUND_SECONDS / best_seconds(calls[way], 3)))
    result.times = {way.name: [] for way in ways}
    turn = itertools.cycle([ways, ways[::-1]])

    def one_turn() -> None:
        for way in next(turn):
            with way.serving():
                begin = seconds()
                for _ in range(counts[way]):
                    calls[way]()
                result.times[way.name].append((seconds() - begin) / counts[way])

    benchmark.group = "paired: a row is one turn of all ways"
    benchmark.pedantic(one_turn, rounds=rounds, iterations=1)
    if work:
        result.figures["GFLOP"] = work / 1e9
        result.figures["ceiling GFLOP/s"] = product_rate() / 1e9
        result.figures |= {f"share, {way}": work / result.median(way) / product_rate() for way in result.times}
    benchmark.extra_info.update(
        {
            "medians": {way: result.median(way) for way in result.times},
            "ratios": {way: result.ratio(way) for way in result.times},
            "baseline": baseline.name,
            "figures": result.figures,
            "left_out": result.left_out,
        }
    )
    COMPARISONS.append(result)
    return result


def check_default(result: Comparison, default: Way) -> None:
    """Fail where another way of the same kind, compiled or not, beats the default: SERVES follows the figures.

    A single turn, as under --benchmark-disable, is no verdict.
    """
    if len(result.times[default.name]) < ROUNDS:
        return
    for way in (way for way in WAYS if way.name in result.times and way.compiled == default.compiled):
        ratio = statistics.median(result.ratios(default.name, way.name))
        assert not result.slower(default.name, way.name), (
            f"{result.name}: {default.name}, the default here, takes {ratio:.2f} times as long as {way.name}; "
            "change SERVES in ctm_fast/ops/_library.py"
        )
