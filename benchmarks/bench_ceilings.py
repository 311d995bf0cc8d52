"""What the machine can do at most, measured first: the rates that every other figure is held against."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import convolution_rate, copy_bandwidth, matmul_rate


def test_copy(benchmark: BenchmarkFixture) -> None:
    benchmark.extra_info["GB/s"] = benchmark.pedantic(copy_bandwidth, rounds=1) / 1e9


def test_matmul(benchmark: BenchmarkFixture) -> None:
    benchmark.extra_info["TFLOP/s"] = benchmark.pedantic(matmul_rate, rounds=1) / 1e12


def test_convolution(benchmark: BenchmarkFixture) -> None:
    benchmark.extra_info["TFLOP/s"] = benchmark.pedantic(convolution_rate, rounds=1) / 1e12
