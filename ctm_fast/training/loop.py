"""The loop of one stage: steps, figures, saves."""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ctm_fast.distributed import all_mean, all_sum, together
from ctm_fast.errors import DataError, DivergedError
from ctm_fast.models import CTM, EDMDenoiser, save_model
from ctm_fast.training.config import to_dict
from ctm_fast.training.log import StageLog
from ctm_fast.training.memory_order import local
from ctm_fast.training.preview import grid_steps, natural_steps, sample_grid
from ctm_fast.training.reference import Reference
from ctm_fast.training.regions import Timer
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage
from ctm_fast.training.states import save_state

_EVERY = 10.0  # seconds between two lines of progress where there is no bar
_EVALUATED = 500  # samples in an evaluation


class _Means:
    """Means of the figures since the last line of the log; they stay on the device until then.

    Steps that were void have no part in them.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, figures: dict[str, Tensor]) -> None:
        void = figures["skipped"] != 0
        for name, value in figures.items():
            if name != "skipped":
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + torch.where(void, 0.0, value.detach()), count + ~void)

    def take(self) -> dict[str, float]:
        """Over all ranks, the same on each; waits for the device. Figures of void steps alone are left out."""
        names = list(self._sums)
        totals, counts = (torch.stack(values).cpu() for values in zip(*self._sums.values(), strict=True))
        means = all_mean(totals / counts).tolist()
        self._sums = {}
        return {name: mean for name, mean, count in zip(names, means, counts.tolist(), strict=True) if count}


def run_stage(
    stage: Stage,
    run: RunDirectory | None,
    timer: Timer,
    start: int,
    *,
    keep: int | None = None,
    tensorboard: bool = False,
    reference: Reference | None = None,
) -> None:
    """Steps ``start`` to the last of ``stage``, saved every ``snapshot_every`` steps and at the end.

    Shows a bar on a terminal, else a line now and then. Raises :class:`DivergedError`, on every rank, before anything
    is saved of it; :class:`DataError` where nothing more can be written: the states that were saved stay.

    Args:
        run: where it is written, on the first rank; None on the others.
        keep, tensorboard: see :func:`ctm_fast.training.run.train`.
        reference: what evaluations compare with, on the first rank, if there are to be any.
    """
    log = None if run is None else StageLog(stage, run, timer, start, tensorboard=tensorboard)
    try:
        with log or nullcontext():
            _run_steps(stage, run, log, start, keep, reference)
    except OSError as error:
        if run is None:
            raise
        raise DataError(
            f"--outdir: cannot write {run.path}: {error}; with room there, the same command goes on from the last state"
        ) from error


def _run_steps(
    stage: Stage,
    run: RunDirectory | None,
    log: StageLog | None,
    start: int,
    keep: int | None,
    reference: Reference | None,
) -> None:
    config, settings = stage.config, stage.settings
    means = _Means()
    first = printed = time.perf_counter()
    since = start
    quiet = True if run is None else None
    with tqdm(
        initial=start, total=settings.steps, desc=stage.name, unit="step", disable=quiet, dynamic_ncols=True
    ) as bar:
        for step in range(start, settings.steps):
            means.add(stage.train_step(step))
            done = step + 1
            bar.update()
            last = done == settings.steps
            save_now = done % config.snapshot_every == 0 or last
            if done % config.log_every == 0 or save_now:  # no mean reaches over a save: a resumed run logs the same
                figures = _finite(stage, means.take(), done, done - since)
                figures["skipped"] = sum(guard.gather(stage.name) for guard in stage.guards())
                since = done
                if log is not None:
                    line = log.steps(done, figures)
                    if "loss" in line:
                        bar.set_postfix(loss=f"{line['loss']:.4f}")
                    now = time.perf_counter()
                    if bar.disable and (last or now - printed >= _EVERY):
                        left = (now - first) / (done - start) * (settings.steps - done)
                        print(_progress(line, settings.steps, left), flush=True)
                        printed = now
            preview = _due(config.preview_kimg, settings.batch, done) or last or (save_now and not config.preview_kimg)
            evaluate = _due(config.evaluate_kimg, settings.batch, done) or (last and config.evaluate_kimg > 0)
            if not (save_now or preview or evaluate):
                continue
            _check_weights(stage, done)
            with log.aside() if log is not None else nullcontext():
                kept = stage.gather(stage.ema) if preview or evaluate else None
                if log is not None and kept is not None and preview:
                    for steps in grid_steps(kept):
                        log.grid(done, steps, sample_grid(kept, config, steps=steps))
                if log is not None and kept is not None and evaluate and reference is not None:
                    steps = natural_steps(kept)
                    log.evaluation(done, reference.figures(kept, count=_EVALUATED, steps=steps))
                if save_now:
                    if log is not None:
                        log.flush()
                    save(stage, run, done, keep)


def _due(kimg: float, batch: int, step: int) -> bool:
    """Whether step number ``step``, from 1, takes the images seen past a multiple of ``kimg`` thousands."""
    return kimg > 0 and step * batch // (1000 * kimg) > (step - 1) * batch // (1000 * kimg)


def _progress(line: dict[str, Any], steps: int, left: float) -> str:
    loss = f"loss {line['loss']:.4f}, " if "loss" in line else ""
    rate = f"{line['images_per_second']:.0f} images/s"
    return f"{line['stage']} {line['step']}/{steps}: {loss}{rate}, {tqdm.format_interval(left)} left"


def save(stage: Stage, run: RunDirectory | None, step: int, keep: int | None = None) -> None:
    """Snapshot, further averages, and last the state: whatever is there after a crash fits together.

    Called on every rank, and all raise what one does.
    """
    config = stage.config
    metadata = {
        "config": to_dict(config),
        "preset": config.preset,
        "seed": config.seed,
        "stage": stage.name,
        "step": step,
    }

    def write(path: Path, average: CTM | EDMDenoiser | None, about: dict[str, Any]) -> None:
        if run is not None and average is not None:
            save_model(path, average, config.network, about)

    files = RunDirectory(Path(), config) if run is None else run
    kept = stage.gather(stage.ema)
    together(lambda: write(files.snapshot(stage.name, step), kept, metadata))
    for name in stage.averages.names:
        path, average = files.average(name, stage.name, step), stage.gather(stage.averages.model_of(name))
        together(partial(write, path, average, {**metadata, "ema": name}))
    save_state(stage, run, step)
    if run is not None and keep is not None:
        run.prune(stage.name, keep)


def _check_weights(stage: Stage, step: int) -> None:
    """DivergedError if a weight is not finite: the loss, of the weights before the last step, does not tell."""
    finite = torch.stack([local(parameter).isfinite().all() for parameter in stage.model.parameters()]).all()
    if all_sum(~finite) > 0:
        raise DivergedError(
            f"{stage.name}: expected finite weights, got others after step {step}; lower {stage.name}.lr"
        )


def _finite(stage: Stage, figures: dict[str, float], step: int, steps: int) -> dict[str, float]:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"{stage.name}: expected finite figures, got {name} = {value} between steps {step - steps} and {step}; "
                f"lower {stage.name}.lr, or try another seed"
            )
    return figures
