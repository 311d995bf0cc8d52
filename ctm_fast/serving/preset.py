"""What a search found, on disk: for each number of network evaluations the levels and the gamma to sample with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.models import CTM
from ctm_fast.samplers import renoise_levels
from ctm_fast.serving.sampler import Sampler

FORMAT = "ctm_fast.preset.1"


@dataclass(frozen=True)
class Schedule:
    """Levels that a CTM jumps between, from sigma_max to sigma_min, and gamma."""

    sigmas: tuple[float, ...]
    gamma: float


def read_preset(path: Path, sampler: Sampler, *, steps: int, network_sha256: str) -> Schedule:
    """The schedule of ``steps`` jumps in ``path``, for ``sampler``, whose file's digest is ``network_sha256``.

    Raises ConfigError naming ``--preset`` if it is no preset, of another network, or has none for ``steps``.
    """
    if not isinstance(sampler.model, CTM):
        raise ConfigError(f"--preset: expected none for a teacher, whose solver has levels of its own, got {path}")
    try:
        preset = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--preset: expected the search.json of ctm_fast.search, got {path}: {error}") from error
    if not isinstance(preset, dict) or preset.get("format") != FORMAT:
        raise ConfigError(f"--preset: expected the search.json of ctm_fast.search, got another file: {path}")
    if preset.get("network_sha256") != network_sha256:
        raise ConfigError(f"--preset: expected a preset of this network, got another network's: {path}")
    try:
        schedules = {int(nfe): _schedule(int(nfe), entry, sampler.levels) for nfe, entry in preset["nfe"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--preset: expected levels and gamma for each nfe in {path}: {error!r}") from error
    if steps not in schedules:
        raise ConfigError(f"--preset: expected --steps among {', '.join(map(str, sorted(schedules)))}, got {steps}")
    return schedules[steps]


def _schedule(nfe: int, entry: Mapping[str, Any], levels: Levels) -> Schedule:
    schedule = Schedule(tuple(map(float, entry["sigmas"])), float(entry["gamma"]))
    renoise_levels(schedule.sigmas, schedule.gamma)
    if len(schedule.sigmas) != nfe + 1:
        raise ValueError(f"expected {nfe + 1} levels, got {len(schedule.sigmas)}")
    if (schedule.sigmas[0], schedule.sigmas[-1]) != (levels.sigma_max, levels.sigma_min):
        raise ValueError(f"expected levels from {levels.sigma_max} to {levels.sigma_min}, got {schedule.sigmas}")
    return schedule
