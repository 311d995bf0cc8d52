"""After training: the average of any width, from the power-function averages that a run kept (EDM2, Sec. 3.3)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.models import combine_models, read_metadata, save_model
from ctm_fast.training.averages import PowerFunction, parse_average
from ctm_fast.training.power_ema import Profile, solve_weights

FARTHEST = 0.1
"""The largest relative distance of a fit from the profile that was asked for."""


@dataclass(frozen=True)
class Snapshot:
    """A file with the average ``profile`` of a stage of a run."""

    path: Path
    stage: str
    profile: Profile


def find_snapshots(paths: Iterable[Path]) -> list[Snapshot]:
    """Those of ``paths`` whose metadata name ``stage``, ``step`` and an ``ema`` such as ``power:0.05``, by step.

    Raises CheckpointError naming a file that cannot be read or names nothing of that.
    """
    found = []
    for path in paths:
        metadata = read_metadata(path)
        stage, step, ema = (metadata.get(key) for key in ("stage", "step", "ema"))
        try:
            rule = parse_average(str(ema))
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if not isinstance(rule, PowerFunction) or not isinstance(stage, str) or not isinstance(step, int) or step < 1:
            raise CheckpointError(
                f"{path}: expected stage, step and a power-function average, got {stage!r}, {step!r} and {ema!r}"
            )
        found.append(Snapshot(path, stage, Profile(step, rule.sigma_rel)))
    return sorted(found, key=lambda snapshot: (snapshot.profile.step, snapshot.profile.sigma_rel, snapshot.path))


def choose_snapshots(snapshots: Iterable[Snapshot], stage: str | None, step: int | None) -> tuple[list[Snapshot], int]:
    """Those of ``stage`` (None: the only one there is) up to ``step`` (None: the last one's), and that step.

    Raises ConfigError, naming the option of the command line, if there are none.
    """
    snapshots = list(snapshots)
    stages = sorted({snapshot.stage for snapshot in snapshots})
    if stage is None and len(stages) > 1:
        raise ConfigError(f"--stage: expected one of {', '.join(stages)}, got none")
    chosen = [snapshot for snapshot in snapshots if stage in (None, snapshot.stage)]
    if not chosen:
        raise ConfigError(f"--stage: expected one of {', '.join(stages) or 'a run with snapshots'}, got {stage}")
    last = chosen[-1].profile.step
    if step is not None and not chosen[0].profile.step <= step <= last:
        raise ConfigError(f"--step: expected {chosen[0].profile.step} to {last}, the steps of snapshots, got {step}")
    step = last if step is None else step
    # A profile that reaches beyond the step would have to be taken back by others.
    return [snapshot for snapshot in chosen if snapshot.profile.step <= step], step


def fit(snapshots: list[Snapshot], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Weights of ``snapshots`` for ``wanted``, and the distance of the fit; see :func:`solve_weights`.

    Raises ConfigError where that is above :data:`FARTHEST`: the width is too far from what was kept, or snapshots are
    too few.
    """
    weights, distance = solve_weights([snapshot.profile for snapshot in snapshots], wanted)
    if distance > FARTHEST:
        widths = sorted({snapshot.profile.sigma_rel for snapshot in snapshots})
        raise ConfigError(
            f"--ema: expected a width that {len(snapshots)} snapshots of widths {', '.join(map(str, widths))} give, "
            f"got {wanted.sigma_rel} at step {wanted.step}, whose best fit is {distance:.0%} off"
        )
    return weights, distance


def reconstruct(paths: Iterable[Path], sigma_rel: float, out: Path, *, stage: str | None, step: int | None) -> float:
    """Write the average of width ``sigma_rel`` after ``step`` to ``out``; how far its profile is from the exact one.

    Args:
        paths: snapshots of power-function averages of one run; see :func:`find_snapshots`.
        sigma_rel: relative to the steps of the stage.
        out: the .safetensors to write.
        stage, step: see :func:`choose_snapshots`.

    Raises ConfigError for what cannot be had from them, CheckpointError naming a file that does not fit.
    """
    snapshots, step = choose_snapshots(find_snapshots(paths), stage, step)
    weights, distance = fit(snapshots, Profile(step, sigma_rel))
    files = [snapshot.path for snapshot in snapshots]
    model = combine_models(
        files, weights.tolist(), lambda names: tqdm(names, desc="tensors", disable=None, dynamic_ncols=True)
    )
    metadata = read_metadata(files[-1])
    save_model(out, model, model.net.config, {**metadata, "step": step, "ema": f"power:{sigma_rel}", "fit": distance})
    return distance
