"""A whole run: the teacher, its distillation, the report; from wherever the last process stopped."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ctm_fast.data import ImageDataset, load_dataset
from ctm_fast.errors import CheckpointError, ConfigError, DataError
from ctm_fast.files import atomic_write
from ctm_fast.models import EDMDenoiser, load_model
from ctm_fast.training.compile_report import measure
from ctm_fast.training.config import RunConfig, check_sizes
from ctm_fast.training.ctm_stage import CTMStage
from ctm_fast.training.loop import run_stage
from ctm_fast.training.regions import Regions
from ctm_fast.training.report import write_report
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage
from ctm_fast.training.teacher_stage import TeacherStage

_FEWEST = 4
"""Images: two in each half of the comparison that the report makes."""


def train(
    config: RunConfig, outdir: Path, device: torch.device, *, compile: bool = False, teacher: Path | None = None
) -> Path:
    """Run ``config`` in ``outdir`` and return the run's directory; an unfinished run of the same config is continued.

    Args:
        config: what to do; see :class:`~ctm_fast.training.config.RunConfig`.
        device: where.
        compile: whether the regions that pay are compiled; what it buys is logged.
        teacher: an EDM model of :func:`ctm_fast.models.save_model` to distil, for ``stages == ("ctm",)``.

    Raises DataError, ConfigError or CheckpointError before anything is written.
    """
    check_sizes(config.network)
    if teacher is not None and "teacher" in config.stages:
        raise ConfigError(f"--teacher: expected only with --stage ctm, got {teacher} for {', '.join(config.stages)}")
    if teacher is None and "teacher" not in config.stages:
        raise ConfigError("--teacher: expected the teacher's .safetensors for --stage ctm, got none")
    dataset = _dataset(config)
    config = replace(config, data_sha256=_digest(dataset))
    if teacher is not None:
        config = _with_teacher(config, teacher)
    run = RunDirectory.open(outdir, config)
    if run.finished:
        print(f"{run.path}: already finished; {run.path / 'report.md'}")
        return run.path
    if teacher is not None:
        _copy(teacher, run.path / "teacher.safetensors")

    dataset = _to(dataset, device)
    state = run.load_state()
    done = {state["stage"]: state["step"]} if state else {}
    if state and state["stage"] == "ctm":
        done["teacher"] = config.teacher.steps
    run.rewind_stats(done)
    begin = f"going on after step {state['step']} of {state['stage']}" if state else "starting"
    print(f"{run.path}: {begin} on {device}", flush=True)
    for name in config.stages:
        start = done.get(name, 0)
        if start >= _steps(config, name):
            continue
        regions = Regions(compile=compile, device=device)
        stage = _stage(name, config, dataset, device, regions, run)
        if state and state["stage"] == name:
            stage.load_state(state["weights"])
        _compile(stage, regions, run, start)
        run_stage(stage, run, regions.timer, start)
    print("writing the report", flush=True)
    print(write_report(run, dataset, teacher_path(run), device))
    print(run.path / "report.md")
    return run.path


def load_teacher(path: Path, config: RunConfig) -> EDMDenoiser:
    """The EDM model in ``path``; CheckpointError unless it is one and fits ``config``."""
    model, metadata = load_model(path)
    if not isinstance(model, EDMDenoiser):
        raise CheckpointError(f"{path}: expected an EDM teacher, got a CTM")
    expected = {**vars(config.network), "sigma_data": config.sigma_data}
    # A published teacher has an input for augmentations, which no student takes over.
    got = {**vars(metadata["network"]), "augment_dim": 0, "sigma_data": model.sigma_data}
    for key, value in expected.items():
        if got[key] != value:
            raise CheckpointError(f"{path}: expected a teacher of {key} = {value} as configured, got {got[key]}")
    return model


def teacher_path(run: RunDirectory) -> Path:
    """Where the run's teacher lies: its own last snapshot, or the copy of the one it was given."""
    if run.config.teacher_sha256:
        return run.path / "teacher.safetensors"
    return run.snapshot("teacher", run.config.teacher.steps)


def _copy(source: Path, destination: Path) -> None:
    """A copy that is whole or absent."""
    with source.open("rb") as reader:
        atomic_write(destination, lambda file: shutil.copyfileobj(reader, file))


def _stage(
    name: str, config: RunConfig, dataset: ImageDataset, device: torch.device, regions: Regions, run: RunDirectory
) -> Stage:
    if name == "teacher":
        return TeacherStage(config, dataset, device, regions)
    return CTMStage(config, dataset, device, regions, load_teacher(teacher_path(run), config))


def _compile(stage: Stage, regions: Regions, run: RunDirectory, start: int) -> None:
    report = measure(stage, regions)
    if report is not None:
        print(report, flush=True)
        run.append_stats({"stage": stage.name, "step": start, "compile": vars(report)})


def _with_teacher(config: RunConfig, teacher: Path) -> RunConfig:
    try:
        load_teacher(teacher, config)
    except CheckpointError as error:
        raise CheckpointError(f"--teacher {error}") from error
    return replace(config, teacher_sha256=hashlib.sha256(teacher.read_bytes()).hexdigest())


def _dataset(config: RunConfig) -> ImageDataset:
    network = config.network
    dataset = load_dataset(
        config.data.source,
        resolution=network.img_resolution,
        channels=network.img_channels,
        labels=config.data.conditional,
    )
    if config.data.conditional and dataset.num_classes > network.label_dim:
        raise DataError(
            f"--data: expected labels below network.label_dim = {network.label_dim}, "
            f"got {dataset.num_classes - 1} in {config.data.source}"
        )
    if len(dataset.images) < _FEWEST:
        raise DataError(
            f"--data: expected at least {_FEWEST} images, got {len(dataset.images)} in {config.data.source}"
        )
    return dataset


def _digest(dataset: ImageDataset) -> str:
    digest = hashlib.sha256(dataset.images.numpy().tobytes())
    if dataset.labels is not None:
        digest.update(dataset.labels.numpy().tobytes())
    return digest.hexdigest()


def _to(dataset: ImageDataset, device: torch.device) -> ImageDataset:
    labels = None if dataset.labels is None else dataset.labels.to(device)
    return replace(dataset, images=dataset.images.to(device), labels=labels)


def _steps(config: RunConfig, stage: str) -> int:
    return config.teacher.steps if stage == "teacher" else config.ctm.steps
