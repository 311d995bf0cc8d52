"""What every benchmark runs under: pinned threads, a clock that waits for the device, a fresh ``torch.compile``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import harness
from ctm_fast.report import report
from ctm_fast.runtime import MATMUL_PRECISION


def pytest_configure() -> None:
    torch.set_num_threads(harness.THREADS)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.seconds, disable_gc=True))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No function is compiled a ninth time, at which ``torch.compile`` would give up; the same numbers every time."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    if harness.DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    values = report()
    machine_info |= {"report": {key: values[key] for key in ("machine", "versions", "build", "libraries")}}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if harness.COMPARISONS:
        terminalreporter.section("paired in one run: median, ratio to the baseline")
        for comparison in harness.COMPARISONS:
            terminalreporter.write_line(str(comparison))
