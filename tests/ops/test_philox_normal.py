"""philox_normal and philox_words: the same numbers everywhere, and numbers that look like noise."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ctm_fast.ops import Stream, philox_normal, philox_words
from ctm_fast.ops._library import INTERPRETED, unavailable
from ctm_fast.ops.reference import philox_normal as reference
from tests.ops.harness import Inputs, Op, Serving
from tests.ops.philox import BOUND, Words, exact_normal, exact_words, philox4x32, random_seeds

ROOT = Path(__file__).parents[2]

# Random123's kat_vectors: counter, key, result.
KNOWN: list[tuple[Words, tuple[int, int], Words]] = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

FIXED = [
    [-1.00119542, -0.44541643, -0.06247533, 0.46620874, -1.42789603, -0.18778841],
    [-0.39268644, 0.81976049, -0.15673008, -0.21835741, -1.30492356, 0.18167653],
]
"""Seeds 0 and 1234567890123456789 at step 7, stream 1."""

LARGE_BLOCKS = [2**32 - 1, 2**32, 2**32 + 5, 2**61 + 3]
"""Blocks e >> 2 whose index needs the counter's second word: too many elements to allocate."""


def large(block: int) -> Words:
    return philox4x32((block % 2**32, block >> 32, 9, Stream.CHURN), (7, 1))


class Noise(Op):
    anchor = "seeds"

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return {"seeds": random_seeds(shape[0], generator), "step": 2**32 - 2, "shape": shape[1:], "stream": 1}

    @pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 5), (2, 3, 4, 5), (3, 0)], ids=str)
    def test_ranks(self, serving: Serving, shape: tuple[int, ...], generator: torch.Generator) -> None:
        self.check_values(self.inputs((3, *shape), torch.float32, generator), serving)

    def test_any_batch(self, serving: Serving, generator: torch.Generator) -> None:
        """A sample's noise does not depend on the batch it is in, nor on how its shape is told: to the bit."""
        inputs = self.inputs((9, 3, 5, 7), torch.float32, generator)
        seeds = inputs.pop("seeds").to(serving.device)
        whole = self.op(seeds, **inputs)
        order = torch.randperm(9, generator=generator).to(serving.device)
        assert torch.equal(self.op(seeds[order], **inputs), whole[order])
        assert torch.equal(self.op(seeds[4:5], **inputs), whole[4:5])
        assert torch.equal(self.op(seeds, **inputs | {"shape": (105,)}), whole.flatten(1))
        assert torch.equal(self.op(seeds, **inputs | {"shape": [2, 5, 7]}), whole[:, :2])

    def test_strided_seeds(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = self.inputs((8, 3, 5, 7), torch.float32, generator)
        self.check_values(inputs | {"seeds": inputs["seeds"][::2]}, serving)
        self.check_values(inputs | {"seeds": inputs["seeds"][:1].expand(4)}, serving)

    def test_steps_share_a_graph(self, serving: Serving, generator: torch.Generator) -> None:
        """A sampler's steps: one graph for the first, one with the step as a variable for all that follow."""
        graphs: list[object] = []

        def backend(graph: Any, example: Any) -> Any:
            graphs.append(graph)
            return graph

        inputs = self.inputs((3, 3, 5, 7), torch.float32, generator)
        seeds = inputs["seeds"].to(serving.device)
        torch._dynamo.reset()
        compiled = torch.compile(self.op, backend=backend, fullgraph=True)
        for step in (0, 1, 2, 3, 17, 2**32 - 1):
            arguments = inputs | {"seeds": seeds, "step": step}
            assert torch.equal(compiled(**arguments), self.op(**arguments))
        assert len(graphs) <= 2

    @pytest.mark.parametrize(
        ("wrong", "error", "message"),
        [
            ({"step": -1}, ValueError, "^step: expected 0 to 4294967295, got -1$"),
            ({"step": 2**32}, ValueError, "^step: expected 0 to 4294967295, got 4294967296$"),
            ({"step": 1.0}, TypeError, "^step: expected an int, got float$"),
            ({"stream": -2}, ValueError, "^stream: expected 0 to 4294967295, got -2$"),
            ({"stream": "churn"}, TypeError, "^stream: expected an int, got str$"),
            ({"shape": (3, -1)}, ValueError, r"^shape: expected sizes of 0 or more, got \[3, -1\]$"),
            ({"shape": 12}, TypeError, "^shape: expected a sequence of ints, got 12$"),
            ({"shape": (1.5,)}, TypeError, r"^shape: expected a sequence of ints, got \(1\.5,\)$"),
        ],
        ids=str,
    )
    def test_argument_messages(
        self, serving: Serving, wrong: Inputs, error: type[Exception], message: str, generator: torch.Generator
    ) -> None:
        inputs = self.inputs((3, 3, 5, 7), torch.float32, generator)
        inputs["seeds"] = inputs["seeds"].to(serving.device)
        self.check_error(inputs | wrong, error, message)


class TestPhiloxWords(Noise):
    op = staticmethod(philox_words)

    def exact(self, **inputs: Any) -> Tensor:
        return exact_words(**inputs)

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> Tensor:
        assert dtype == torch.int64
        return torch.tensor(0.0)


class TestPhiloxNormal(Noise):
    op = staticmethod(philox_normal)

    def exact(self, **inputs: Any) -> Tensor:
        return exact_normal(**inputs)

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> Tensor:
        assert dtype == torch.float32
        return torch.tensor(BOUND)

    @pytest.mark.parametrize("shape", [(3, 5, 7), (3, 8, 8), (5, 3, 3), (70, 6, 6), (1, 4, 4), (2, 40, 40), (0, 2, 2)])
    def test_channels_last(self, serving: Serving, shape: tuple[int, ...], generator: torch.Generator) -> None:
        """The memory format moves the numbers and changes none: to the bit."""
        seeds = random_seeds(5, generator).to(serving.device)
        expected = philox_normal(seeds, 3, shape, stream=Stream.X_T)
        found = philox_normal(seeds, 3, shape, stream=Stream.X_T, memory_format=torch.channels_last)
        assert torch.equal(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)

    def test_channels_last_compiles(self, serving: Serving, generator: torch.Generator) -> None:
        arguments: Inputs = {
            "seeds": random_seeds(3, generator).to(serving.device),
            "step": 3,
            "shape": (3, 5, 7),
            "stream": Stream.X_T,
            "memory_format": torch.channels_last,
        }
        torch._dynamo.reset()
        compiled = torch.compile(philox_normal, backend="aot_eager", fullgraph=True)(**arguments)
        expected = philox_normal(**arguments)
        assert torch.equal(compiled, expected)
        assert compiled.stride() == expected.stride()

    def test_channels_last_messages(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = {"seeds": random_seeds(3, generator).to(serving.device), "step": 0, "stream": 0}
        last = {"memory_format": torch.channels_last}
        self.check_error(
            inputs | last | {"shape": (3, 4)}, ValueError, r"^shape: expected \(C, H, W\) .* got \[3, 4\]$"
        )
        self.check_error(
            inputs | {"shape": (3, 4, 4), "memory_format": torch.channels_last_3d},
            ValueError,
            "^memory_format: expected torch.contiguous_format or torch.channels_last, got torch.channels_last_3d$",
        )

    def test_fixed(self, serving: Serving) -> None:
        """Numbers written down once: what a seed stands for never changes."""
        seeds = torch.tensor([0, 1234567890123456789], device=serving.device)
        found = philox_normal(seeds, 7, (2, 1, 3), stream=Stream.RENOISE).cpu()
        torch.testing.assert_close(found.flatten(1), torch.tensor(FIXED), rtol=0, atol=BOUND)


def test_streams() -> None:
    """Numbers are for ever: another would give a seed other noise."""
    sampling = {"X_T": 0, "RENOISE": 1, "CHURN": 2, "LANGEVIN": 3}
    training = {"TRAIN": 4, "DSM": 5}
    likelihood = {
        "DEQUANTISE": 6,
        "PROBE": 7,
        "BOUND": 8,
        "LABEL": 9,
    }
    assert dict(Stream.__members__) == sampling | training | likelihood


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
class TestKnownAnswers:
    def test_truth(self, counter: Words, key: tuple[int, int], expected: Words) -> None:
        assert philox4x32(counter, key) == expected

    def test_reference(self, counter: Words, key: tuple[int, int], expected: Words) -> None:
        c0, c1, c2, c3, k0, k1 = (torch.tensor([word]) for word in (*counter, *key))
        assert tuple(int(word) for word in reference.philox4x32((c0, c1, c2, c3), (k0, k1))) == expected

    def test_header(self, header: "Header", counter: Words, key: tuple[int, int], expected: Words) -> None:
        assert header.philox(counter, key) == expected


class Header:
    """``csrc/common/philox.h`` in a program of its own."""

    SOURCE: ClassVar[str] = r"""
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include "philox.h"
using namespace ctm_fast;

unsigned long long number(const char* text) { return std::strtoull(text, nullptr, 10); }

void print(Block block) { for (unsigned word : block.words) std::printf("%u ", word); }

int main(int count, char** arguments) {
  if (count == 7) {  // counter, key
    Block counter;
    for (int i = 0; i < 4; ++i) counter.words[i] = number(arguments[1 + i]);
    print(philox4x32(counter, number(arguments[5]) | number(arguments[6]) << 32));
  } else if (count == 5) {  // seed, block, step, stream
    const Block counter = noise_counter(number(arguments[2]), number(arguments[3]), number(arguments[4]));
    print(philox4x32(counter, number(arguments[1])));
  } else {  // every u: the largest errors of the radius, and of sine and cosine
    double radius = 0, turn = 0;
    for (unsigned k = 0; k < 1u << 24; ++k) {
      const float u = uniform(k << 8);
      const double exact = std::sqrt(-2 * std::log(double(u)));
      radius = std::max(radius, std::fabs(sqrtf(-2 * log_normal_number(u)) - exact));
      const float theta = product(6.283185307179586f, u);
      const SinCos found = sin_cos_turn(theta);
      turn = std::max(turn, std::fabs(found.sin - std::sin(double(theta))));
      turn = std::max(turn, std::fabs(found.cos - std::cos(double(theta))));
    }
    std::printf("%.9g %.9g", radius, turn);
  }
}
"""

    def __init__(self, directory: Path, compiler: str, *flags: str) -> None:
        self.program = directory / "philox"
        source = directory / "philox.cpp"
        source.write_text(self.SOURCE)
        include = [f"-I{ROOT / 'csrc' / 'common'}", "-isystem", f"{Path(torch.__file__).parent / 'include'}"]
        build = [compiler, "-std=c++17", "-O2", *flags, *include, str(source), "-o", str(self.program)]
        subprocess.run(build, check=True)

    def run(self, *arguments: int) -> list[str]:
        command = [str(self.program), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    def philox(self, counter: Words, key: tuple[int, int]) -> tuple[int, ...]:
        return tuple(map(int, self.run(*counter, *key)))


@pytest.fixture(scope="module", params=["-ffp-contract=off", "-ffp-contract=fast -march=native"])
def header(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Header:
    """As the CPU kernels are built, and with the fused multiply-adds that CUDA's compiler makes."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return Header(tmp_path_factory.mktemp("header"), compiler, *request.param.split())


def test_header_every_uniform(header: Header) -> None:
    """All 2^24 values of u: n = radius * turn, |radius| < 5.9, is off by at most 3.6e-7 + 5.9 * 1.0e-7 + 2.4e-7."""
    radius, turn = map(float, header.run())
    assert radius < 3.6e-7
    assert turn < 1.0e-7
    assert radius + 5.9 * turn + 2.4e-7 < BOUND


@pytest.mark.parametrize("block", LARGE_BLOCKS)
class TestLargeBlocks:
    """The counter's second word, which no sample that fits in memory reaches."""

    def test_reference(self, block: int) -> None:
        counter = reference.counter(torch.tensor([block]), 9, Stream.CHURN)
        found = reference.philox4x32(counter, (torch.tensor([7]), torch.tensor([1])))
        assert tuple(map(int, found)) == large(block)

    def test_header(self, header: Header, block: int) -> None:
        assert tuple(map(int, header.run(2**32 + 7, block, 9, Stream.CHURN))) == large(block)

    @pytest.mark.skipif(unavailable("triton", "cpu") is not None, reason="Triton runs on a CPU in its interpreter only")
    def test_triton(self, block: int) -> None:
        from tests.ops import philox_block_kernel

        found = philox_block_kernel.philox_block(2**32 + 7, 9, Stream.CHURN, block)
        assert tuple(found.tolist()) == large(block)


class TestStatistics:
    """2^20 normals of fixed seeds (2^15 in Triton's interpreter, which takes 10 ms for each 1024).

    Thresholds: four standard deviations of each estimate (1 in 16,000), and 1 in 1,000 for Kolmogorov and Smirnov.
    """

    SAMPLES: ClassVar[int] = 64

    def draw(self, serving: Serving, seeds: Tensor | None = None, step: int = 5, stream: int = Stream.X_T) -> Tensor:
        seeds = torch.arange(self.SAMPLES) if seeds is None else seeds
        interpreted = INTERPRETED and serving.backend == "triton"
        shape = (1, 16, 32) if interpreted else (1, 128, 128)
        return philox_normal(seeds.to(serving.device), step, shape, stream=stream).cpu().double().flatten(1)

    def assert_uncorrelated(self, one: Tensor, other: Tensor) -> None:
        """Neither the numbers nor their squares, which would show a radius shared."""
        for a, b in ((one, other), (one.square() - 1, other.square() - 1), (one, other.square() - 1)):
            correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
            assert abs(correlation) < 4 / a.numel() ** 0.5

    def test_moments(self, serving: Serving) -> None:
        normal = self.draw(serving)
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
            assert abs(normal.pow(power).mean() - moment) < 4 * (variance / normal.numel()) ** 0.5

    def test_distribution(self, serving: Serving) -> None:
        """Kolmogorov and Smirnov's distance to the normal distribution, over all and for each lane."""
        normal = self.draw(serving)
        for sample in (normal, *normal.unflatten(1, (-1, 4)).unbind(-1)):
            ordered = torch.special.ndtr(sample.flatten()).sort().values
            grid = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
            distance = torch.maximum((ordered - grid[:-1]).max(), (grid[1:] - ordered).max())
            assert distance < 1.95 / len(ordered) ** 0.5

    def test_lanes(self, serving: Serving) -> None:
        lanes = self.draw(serving).unflatten(1, (-1, 4)).unbind(-1)
        for i in range(4):
            for j in range(i):
                self.assert_uncorrelated(lanes[i], lanes[j])

    def test_neighbours(self, serving: Serving) -> None:
        normal = self.draw(serving)
        for distance in (1, 2, 4, 128):
            self.assert_uncorrelated(normal[:, distance:], normal[:, :-distance])

    def test_seeds(self, serving: Serving) -> None:
        normal = self.draw(serving)
        self.assert_uncorrelated(normal[1:], normal[:-1])
        self.assert_uncorrelated(normal, self.draw(serving, torch.arange(self.SAMPLES) + 2**32))

    def test_steps_and_streams(self, serving: Serving) -> None:
        """Step and stream are words of the counter each: (5, 0), (0, 5) and the others have nothing in common."""
        normal = self.draw(serving)
        for step, stream in ((6, 0), (5, 1), (0, 5), (5, Stream.DSM)):
            self.assert_uncorrelated(normal, self.draw(serving, step=step, stream=stream))
