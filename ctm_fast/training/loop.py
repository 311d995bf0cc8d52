"""The loop of one stage: steps, figures, saves."""

import math
import time
from collections import defaultdict
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ctm_fast import __version__
from ctm_fast.models import save_model
from ctm_fast.training.config import to_dict
from ctm_fast.training.preview import save_preview
from ctm_fast.training.regions import Timer
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage


class Diverged(RuntimeError):
    """A loss is no longer finite."""


class _Means:
    """Means of the figures since the last line of the log; they stay on the device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> dict[str, float]:
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def run_stage(stage: Stage, run: RunDirectory, timer: Timer, start: int) -> None:
    """Steps ``start`` to the last of ``stage``, saved every ``snapshot_every`` steps and at the end."""
    config, settings = run.config, stage.settings
    means = _Means()
    begin = time.perf_counter()
    since = start
    with tqdm(
        initial=start, total=settings.steps, desc=stage.name, unit="step", disable=None, dynamic_ncols=True
    ) as bar:
        for step in range(start, settings.steps):
            means.add(stage.train_step(step))
            done = step + 1
            bar.update()
            last = done == settings.steps
            if done % config.log_every == 0 or last:
                figures = means.take()
                seconds = time.perf_counter() - begin
                _log(stage, run, timer, done, done - since, seconds, figures)
                bar.set_postfix(loss=f"{figures['loss']:.4f}")
                begin, since = time.perf_counter(), done
            if done % config.snapshot_every == 0 or last:
                save(stage, run, done)
                begin = time.perf_counter()


def save(stage: Stage, run: RunDirectory, step: int) -> None:
    """Snapshot, sample grid, and last the state: whatever is there after a crash fits together."""
    config = run.config
    save_model(
        run.snapshot(stage.name, step),
        stage.ema,
        config.network,
        {"config": to_dict(config), "preset": config.preset, "seed": config.seed, "stage": stage.name, "step": step},
    )
    save_preview(stage.ema, config, run.path / "samples" / f"{stage.name}-{step:06d}.png")
    run.save_state(
        {
            "ctm_fast": __version__,
            "config": to_dict(config),
            "stage": stage.name,
            "step": step,
            "weights": stage.state(),
        }
    )


def _log(
    stage: Stage, run: RunDirectory, timer: Timer, step: int, steps: int, seconds: float, figures: dict[str, float]
) -> None:
    line: dict[str, Any] = {
        "stage": stage.name,
        "step": step,
        **figures,
        "seconds": seconds,
        "images_per_second": steps * stage.settings.batch / seconds,
        **{f"{part}_seconds": value for part, value in timer.take().items()},
    }
    for name, value in figures.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{stage.name}: {name} is {value} between steps {step - steps} and {step}; "
                f"lower {stage.name}.lr, or go on from the last save with another seed"
            )
    run.append_stats(line)
