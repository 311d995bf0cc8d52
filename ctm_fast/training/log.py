"""What a stage writes down while it trains: lines of stats.jsonl and, where asked for, TensorBoard's event files."""

import importlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from PIL import Image

from ctm_fast.errors import ConfigError
from ctm_fast.pictures import save_png
from ctm_fast.training.reference import Figures
from ctm_fast.training.regions import Timer
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage
from ctm_fast.training.work import operations

_STATUS = Path("/proc/self/status")


class _Events(Protocol):
    """:class:`ctm_fast.training.tensorboard.EventFiles`, which need not be there."""

    def scalars(self, step: int, figures: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, image: Image.Image) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def check_tensorboard() -> None:
    """Raise ConfigError naming the extra if event files cannot be written."""
    try:
        importlib.import_module("ctm_fast.training.tensorboard")
    except ImportError as error:
        raise ConfigError(f"--tensorboard: {error}") from error


class StageLog:
    """The figures of ``stage`` in ``run``, from step ``start`` on; kept by the first rank.

    The clock stands still in :meth:`aside`. Event files are in a folder of the stage's own, as steps are counted anew.
    """

    def __init__(self, stage: Stage, run: RunDirectory, timer: Timer, start: int, *, tensorboard: bool) -> None:
        self.stage, self.run, self.timer = stage, run, timer
        self._operations = operations(stage.config.network, s_branch=stage.name != "teacher")
        self._events: _Events | None = None
        if tensorboard:
            module = importlib.import_module("ctm_fast.training.tensorboard")
            self._events = module.EventFiles(run.path / "tensorboard" / stage.name, start)
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(stage.device)
        self._step, self._passes = start, stage.passes
        self._begin = time.perf_counter()
        timer.take()

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is no part of a step's time. Waits for the device, whose steps are."""
        if self.stage.device.type == "cuda":
            torch.cuda.synchronize(self.stage.device)
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def steps(self, step: int, figures: dict[str, float]) -> dict[str, Any]:
        """Append the means over the steps since the last line, and what they cost; the line that was written.

        ``seconds`` and what follows from them are of this rank. ``tflops`` are 10^12 operations of the network in a
        second of one rank: its forward passes, counted (:mod:`ctm_fast.training.work`), by the operations of one.
        ``data_seconds`` is how long batches took to lie on the device. The peak of memory is the stage's on a GPU, the
        process's on a CPU.
        """
        now = time.perf_counter()
        seconds, passes = now - self._begin, self.stage.passes - self._passes
        images = (step - self._step) * self.stage.settings.batch
        parts = self.timer.take()
        line: dict[str, Any] = {
            "stage": self.stage.name,
            "step": step,
            **figures,
            "lr": float(self.stage.optimizer.param_groups[0]["lr"]),
            "seconds": seconds,
            "images_per_second": images / seconds,
            "seconds_per_kimg": 1000 * seconds / images,
            **{f"{part}_seconds": value for part, value in parts.items()},
            **({"teacher_share": parts["teacher"] / seconds} if "teacher" in parts else {}),
            **_peak_memory(self.stage.device),
            "tflops": passes * self._operations / seconds / 1e12,
        }
        self.run.append_stats(line)
        if self._events is not None:
            self._events.scalars(step, {name: line[name] for name in line if name not in ("stage", "step")})
        self._begin, self._step, self._passes = time.perf_counter(), step, self.stage.passes
        return line

    def evaluation(self, step: int, figures: Figures) -> None:
        """Append what samples of the average that is kept are like."""
        told = {name: value for name, value in vars(figures).items() if value is not None}
        self.run.append_stats({"stage": self.stage.name, "step": step, "evaluation": told})
        if self._events is not None:
            self._events.scalars(step, {f"evaluation/{name}": value for name, value in told.items()})

    def grid(self, step: int, steps: int, image: Image.Image) -> None:
        """Keep a sample grid."""
        save_png(image, self.run.grid(self.stage.name, step, steps))
        if self._events is not None:
            self._events.image(step, f"samples/{steps} steps" if steps > 1 else "samples/1 step", image)

    def flush(self) -> None:
        """Have all of it on disk, before a state that goes on from here is."""
        if self._events is not None:
            self._events.flush()


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    # Not getrusage: a process takes its peak over from the one that started it.
    match = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return {"peak_memory_mib": int(match[1]) / 1024} if match else {}
