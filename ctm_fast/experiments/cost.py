"""What an experiment trains, and about how long that takes here."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ctm_fast.experiments.lab import Experiment
from ctm_fast.experiments.variants import student_run, teacher_run
from ctm_fast.models import EDMDenoiser, NetworkConfig, build_network
from ctm_fast.training import RunConfig
from ctm_fast.training.config import to_dict

_FILLED_IN = ("data_sha256", "teacher_sha256", "student_sha256")
_BATCH = 32


def planned(experiment: Experiment, base: RunConfig, seeds: Sequence[int]) -> Iterator[tuple[str, RunConfig]]:
    """Name and configuration of every run that ``experiment`` rests on, each once."""
    for size in experiment.sizes or (None,):
        sized = base if size is None else replace(base, network=size.of(base.network))
        suffix = "" if size is None else f" {size.channels}x{size.blocks}"
        for seed in seeds:
            if experiment.teacher:
                yield f"teacher{suffix}, seed {seed}", teacher_run(sized, seed)
            for variant in experiment.variants:
                yield f"{variant.name}{suffix}, seed {seed}", student_run(sized, seed, variant)


def work(config: RunConfig) -> float:
    """Samples that go forward through the network in the run's one stage, a backward pass counted as two of them."""
    (stage,) = config.stages
    if stage == "teacher":
        return 3.0 * config.teacher.steps * config.teacher.batch
    settings = config.of_student(stage)
    solver = 2 * (2 * settings.max_solver_steps + 1) / 3 if settings.solver == "teacher" else 1.0  # P(k) ~ k
    # The estimate's two jumps, the outer one with a gradient to its input alone; the target's two; DSM.
    step = solver + 3 + 2 + 2 + (3 if settings.dsm_weight > 0 else 0)
    return settings.steps * settings.batch * step


def seconds_per_sample(network: NetworkConfig, device: torch.device) -> float:
    """Of one forward pass in float32, a third of a pass there and back; the better of three."""
    model = EDMDenoiser(build_network(network, s_branch=False)).to(device)
    size = network.img_resolution
    x = torch.randn(_BATCH, network.img_channels, size, size, device=device)
    sigma = torch.ones(_BATCH, device=device)
    labels = torch.zeros(_BATCH, dtype=torch.int64, device=device) if network.label_dim else None
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        model.denoise(x, sigma, labels).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:]) / (3 * _BATCH)


def is_there(outdir: Path, config: RunConfig) -> bool:
    """Whether a run of this configuration has been finished in ``outdir``, whatever data it was made with."""
    (stage,) = config.stages
    last = f"snapshot-{stage}-{config.steps(stage):06d}.safetensors"
    for path in outdir.glob("*/config.json"):
        try:
            found = json.loads(path.read_text())["config"] | dict.fromkeys(_FILLED_IN, "")
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            continue
        if found == to_dict(config) and (path.parent / last).exists():
            return True
    return False


def estimate(
    experiment: Experiment, base: RunConfig, seeds: Sequence[int], outdir: Path, device: torch.device
) -> list[list[str]]:
    """A table of the runs: steps, whether they are there, and the seconds that the others will take."""
    rows = [["run", "steps", "seconds, about"]]
    speeds: dict[NetworkConfig, float] = {}
    total = 0.0
    for name, config in planned(experiment, base, seeds):
        if is_there(outdir, config):
            rows.append([name, str(config.steps(config.stages[0])), "there"])
            continue
        if config.network not in speeds:
            speeds[config.network] = seconds_per_sample(config.network, device)
        seconds = work(config) * speeds[config.network]
        total += seconds
        rows.append([name, str(config.steps(config.stages[0])), f"{seconds:.0f}"])
    return [*rows, ["together", "", f"{total:.0f}"]]
