"""What every benchmark runs under: pinned threads, a clock that waits for the device, a fresh ``torch.compile``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.processes import THREADS
from benchmarks.recorder import Recorder
from benchmarks.recording import Recording
from ctm_fast.runtime import MATMUL_PRECISION


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("recording", "what `python -m benchmarks.record` gives")
    group.addoption(
        "--record", type=Path, metavar="FILE", help="keep the figures in this file, and leave out what it has"
    )
    group.addoption("--record-until", type=float, default=float("inf"), help="stop at this time.monotonic()")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    if config.option.record is not None:
        config.pluginmanager.register(Recorder(Recording(config.option.record), config.option.record_until))


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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if harness.COMPARISONS:
        terminalreporter.section("paired in one run: median, ratio to the baseline")
        for comparison in harness.COMPARISONS:
            terminalreporter.write_line(str(comparison))
