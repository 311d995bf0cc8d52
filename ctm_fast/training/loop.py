"""The loop of one stage: steps, figures, saves."""

import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ctm_fast.distributed import all_mean, all_sum, together
from ctm_fast.errors import DivergedError
from ctm_fast.models import save_model
from ctm_fast.training.config import to_dict
from ctm_fast.training.memory_order import local
from ctm_fast.training.preview import save_preview
from ctm_fast.training.regions import Timer
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage
from ctm_fast.training.states import save_state

_EVERY = 10.0  # seconds between two lines of progress where there is no bar


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


def run_stage(stage: Stage, run: RunDirectory | None, timer: Timer, start: int, *, keep: int | None = None) -> None:
    """Steps ``start`` to the last of ``stage``, saved every ``snapshot_every`` steps and at the end.

    Shows a bar on a terminal, else a line now and then. Raises :class:`DivergedError`, on every rank, before anything
    is saved of it.

    Args:
        run: where it is written, on the first rank; None on the others.
        keep: see :func:`ctm_fast.training.run.train`.
    """
    config, settings = stage.config, stage.settings
    means = _Means()
    first = printed = begin = time.perf_counter()
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
                now = time.perf_counter()
                if run is not None:
                    line = _log(stage, run, timer, done, done - since, now - begin, figures)
                    if "loss" in line:
                        bar.set_postfix(loss=f"{line['loss']:.4f}")
                    if bar.disable and (last or now - printed >= _EVERY):
                        left = (now - first) / (done - start) * (settings.steps - done)
                        print(_progress(line, settings.steps, left), flush=True)
                        printed = now
                begin, since = time.perf_counter(), done
            if save_now:
                save(stage, run, done, keep)
                begin = time.perf_counter()


def _progress(line: dict[str, Any], steps: int, left: float) -> str:
    loss = f"loss {line['loss']:.4f}, " if "loss" in line else ""
    rate = f"{line['images_per_second']:.0f} images/s"
    return f"{line['stage']} {line['step']}/{steps}: {loss}{rate}, {tqdm.format_interval(left)} left"


def save(stage: Stage, run: RunDirectory | None, step: int, keep: int | None = None) -> None:
    """Snapshots, sample grid, and last the state: whatever is there after a crash fits together.

    Called on every rank, and all raise what one does. :class:`DivergedError` before anything is written if a weight is
    not finite.
    """
    config = stage.config
    finite = torch.stack([local(parameter).isfinite().all() for parameter in stage.model.parameters()]).all()
    if all_sum(~finite) > 0:
        raise DivergedError(
            f"{stage.name}: expected finite weights, got others after step {step}; lower {stage.name}.lr"
        )
    kept = stage.gather(stage.ema)

    def write() -> None:
        if run is None or kept is None:
            return
        metadata = {
            "config": to_dict(config),
            "preset": config.preset,
            "seed": config.seed,
            "stage": stage.name,
            "step": step,
        }
        save_model(run.snapshot(stage.name, step), kept, config.network, metadata)
        save_preview(kept, config, run.path / "samples" / f"{stage.name}-{step:06d}.png")

    together(write)
    save_state(stage, run, step)
    if run is not None and keep is not None:
        run.prune(stage.name, keep)


def _finite(stage: Stage, figures: dict[str, float], step: int, steps: int) -> dict[str, float]:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"{stage.name}: expected finite figures, got {name} = {value} between steps {step - steps} and {step}; "
                f"lower {stage.name}.lr, or try another seed"
            )
    return figures


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
    run.append_stats(line)
    return line
