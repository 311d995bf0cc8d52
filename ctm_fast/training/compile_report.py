"""What compiling buys a stage: the same steps timed without and with it, before training starts."""

import copy
import math
import statistics
import time
from dataclasses import dataclass

import torch

from ctm_fast.training.regions import Regions
from ctm_fast.training.stage import Stage

_STEPS = range(3)


@dataclass(frozen=True)
class CompileReport:
    """Images per second, and what the compilation cost."""

    stage: str
    regions: tuple[str, ...]
    eager: float
    compiled: float
    compile_seconds: float
    break_even: int | None
    """The step after which compiling has paid for itself; None if it does not within the stage."""

    def __str__(self) -> str:
        pays = f"pays from step {self.break_even}" if self.break_even is not None else "does not pay in this stage"
        return (
            f"{self.stage}: {self.eager:.0f} images/s eager, {self.compiled:.0f} compiled "
            f"({'; '.join(self.regions)}); {self.compile_seconds:.1f} s to compile, {pays}"
        )


def measure(stage: Stage, regions: Regions) -> CompileReport | None:
    """Time a few steps of ``stage`` both ways and put its state back; None if it has nothing compiled."""
    if not regions.compiled:
        return None
    saved = copy.deepcopy(stage.state())
    regions.enabled = False
    eager = _seconds_per_step(stage, saved)
    regions.enabled = True
    begin = time.perf_counter()
    _steps(stage, saved)
    first = time.perf_counter() - begin
    compiled = _seconds_per_step(stage, saved)
    stage.load_state(saved)
    regions.timer.take()
    cost = max(0.0, first - compiled * len(_STEPS))
    batch = stage.settings.batch
    return CompileReport(
        stage=stage.name,
        regions=tuple(regions.compiled),
        eager=batch / eager,
        compiled=batch / compiled,
        compile_seconds=cost,
        break_even=break_even(cost, eager - compiled, stage.settings.steps),
    )


def break_even(cost: float, saved_per_step: float, steps: int) -> int | None:
    """After how many of ``steps`` the seconds ``cost`` are won back; None if not within them."""
    if saved_per_step <= 0 or cost > saved_per_step * steps:
        return None
    return math.ceil(cost / saved_per_step)


def _seconds_per_step(stage: Stage, saved: dict[str, object]) -> float:
    return statistics.median(_steps(stage, saved) for _ in range(3)) / len(_STEPS)


def _steps(stage: Stage, saved: dict[str, object]) -> float:
    stage.load_state(copy.deepcopy(saved))
    begin = time.perf_counter()
    for step in _STEPS:
        stage.train_step(step)
    if stage.device.type == "cuda":
        torch.cuda.synchronize(stage.device)
    return time.perf_counter() - begin
