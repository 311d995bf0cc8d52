"""The pytest plugin behind ``--record``: each benchmark's figures go to the file of the machine as it ends."""

import time
from collections.abc import Generator
from typing import Any

import pytest
import torch

from benchmarks.recording import DEVICE_LOST, OUT_OF_TIME, Recording

MESSAGE_LENGTH = 300


class Recorder:
    """Leaves out what ``recording`` has, and stops between benchmarks once ``deadline`` (time.monotonic()) is over."""

    def __init__(self, recording: Recording, deadline: float) -> None:
        self.recording = recording
        self.deadline = deadline
        self.lost = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = [item for item in items if self.recording.has(item.name)]
        if known:
            config.hook.pytest_deselected(items=known)
            items[:] = [item for item in items if item not in known]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.lost:
            pytest.exit("the GPU is lost to this process", returncode=DEVICE_LOST)
        if time.monotonic() > self.deadline:
            pytest.exit("out of time", returncode=OUT_OF_TIME)
        self.recording.begin(item.name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        failure = None
        if report.failed and call.excinfo is not None:
            failure = " ".join(call.excinfo.exconly().split())[:MESSAGE_LENGTH]
            self.lost = _lost()
        if call.when == "call" or failure is not None:
            self.recording.end(item.name, _figures(item) if call.when == "call" else None, failure)
        elif call.when == "teardown":
            self.recording.end(item.name, None, None)  # was skipped while it was set up
        return report


def _figures(item: pytest.Item) -> dict[str, Any] | None:
    """The median and what the benchmark put beside it; None where nothing was timed."""
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is None or benchmark.stats is None or benchmark.has_error:
        return None
    stats = benchmark.stats.stats
    return {"median seconds": stats.median, "rounds": stats.rounds, **benchmark.extra_info}


def _lost() -> bool:
    """Whether the GPU answers this process with errors only, as after an illegal access to its memory."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
