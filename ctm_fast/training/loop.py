"""The loop of one stage: steps, figures, saves."""

import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ctm_fast import __version__
from ctm_fast.diffusion.draws import Purpose, generator
from ctm_fast.errors import DivergedError
from ctm_fast.models import save_model
from ctm_fast.training.config import to_dict
from ctm_fast.training.preview import save_preview
from ctm_fast.training.regions import Timer
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage

_EVERY = 10.0  # seconds between two lines of progress where there is no bar


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
    """Steps ``start`` to the last of ``stage``, saved every ``snapshot_every`` steps and at the end.

    Shows a bar on a terminal, else a line now and then. Raises :class:`DivergedError`, before anything is saved of it.
    """
    config, settings = run.config, stage.settings
    means = _Means()
    first = printed = begin = time.perf_counter()
    since = start
    with tqdm(
        initial=start, total=settings.steps, desc=stage.name, unit="step", disable=None, dynamic_ncols=True
    ) as bar:
        for step in range(start, settings.steps):
            _seed_dropout(config.stage_seed(stage.name), step)
            means.add(stage.train_step(step))
            done = step + 1
            bar.update()
            last = done == settings.steps
            save_now = done % config.snapshot_every == 0 or last
            if done % config.log_every == 0 or save_now:  # no mean reaches over a save: a resumed run logs the same
                figures = means.take()
                now = time.perf_counter()
                line = _log(stage, run, timer, done, done - since, now - begin, figures)
                bar.set_postfix(loss=f"{figures['loss']:.4f}")
                if bar.disable and (last or now - printed >= _EVERY):
                    left = (now - first) / (done - start) * (settings.steps - done)
                    print(_progress(line, settings.steps, left), flush=True)
                    printed = now
                begin, since = time.perf_counter(), done
            if save_now:
                save(stage, run, done)
                begin = time.perf_counter()


def _seed_dropout(seed: int, step: int) -> None:
    """Dropout is the one draw from torch's own generator: with this it too is a function of (seed, stage, step).

    torch's CPU generator keeps only the low 32 bits of a seed, so all three are mixed into those.
    """
    torch.manual_seed(int(generator(seed, step, Purpose.DROPOUT).integers(2**32)))


def _progress(line: dict[str, Any], steps: int, left: float) -> str:
    return (
        f"{line['stage']} {line['step']}/{steps}: loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s, "
        f"{tqdm.format_interval(left)} left"
    )


def save(stage: Stage, run: RunDirectory, step: int) -> None:
    """Snapshot, sample grid, and last the state: whatever is there after a crash fits together.

    Raises :class:`DivergedError` before anything is written if a weight is not finite.
    """
    config = run.config
    if not all(bool(parameter.isfinite().all()) for parameter in stage.model.parameters()):
        raise DivergedError(
            f"{stage.name}: expected finite weights, got others after step {step}; lower {stage.name}.lr"
        )
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
) -> dict[str, Any]:
    """Append the means over the last ``steps`` steps to stats.jsonl; the line that was written."""
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
            raise DivergedError(
                f"{stage.name}: expected finite figures, got {name} = {value} between steps {step - steps} and {step}; "
                f"lower {stage.name}.lr, or try another seed"
            )
    run.append_stats(line)
    return line
