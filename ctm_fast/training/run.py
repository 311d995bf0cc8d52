"""A whole run: teacher, distillation, adversarial stage, report; from wherever the last process stopped."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ctm_fast.data import ImageDataset, load_dataset
from ctm_fast.distributed import agree, of_first, wait_for_all
from ctm_fast.errors import CheckpointError, ConfigError, DataError, UserError
from ctm_fast.files import atomic_write
from ctm_fast.losses.distance import Distance
from ctm_fast.models.features import FeatureNetwork
from ctm_fast.training.compile_report import measure
from ctm_fast.training.config import RunConfig, check_sizes, to_dict
from ctm_fast.training.ctm_stage import CTMStage, distance_of
from ctm_fast.training.execution import Execution
from ctm_fast.training.features import feature_networks, named
from ctm_fast.training.gan_stage import GANStage
from ctm_fast.training.loop import run_stage
from ctm_fast.training.regions import Regions
from ctm_fast.training.report import write_report
from ctm_fast.training.run_directory import STUDENT, TEACHER, RunDirectory
from ctm_fast.training.stage import Stage
from ctm_fast.training.student import fresh_student, load_student, load_teacher
from ctm_fast.training.teacher_stage import TeacherStage

T = TypeVar("T")

_FEWEST = 4
"""Images: two in each half of the comparison that the report makes."""


@dataclass(frozen=True)
class Parts:
    """What the stages of a run are made of beside its configuration."""

    dataset: ImageDataset
    distances: dict[str, Distance]
    features: Sequence[FeatureNetwork]


def train(
    config: RunConfig,
    outdir: Path,
    execution: Execution,
    *,
    teacher: Path | None = None,
    student: Path | None = None,
    features: Sequence[FeatureNetwork] | None = None,
    keep: int | None = None,
    report: bool = True,
) -> Path:
    """Run ``config`` in ``outdir`` and return the run's directory; an unfinished run of the same config is continued.

    Called on every rank of a job; the first one writes.

    Args:
        config: what to do; see :class:`~ctm_fast.training.config.RunConfig`.
        execution: where and how.
        teacher: an EDM model of :func:`ctm_fast.models.save_model` to distil, for stages without ``teacher``.
        student: a CTM to start from, for stages without ``teacher``; needed for ``gan`` alone.
        features: the user's own feature networks for the adversarial stage, in the place of ``gan.features``.
        keep: how many snapshots of each stage are kept; None: all.
        report: whether figures and pictures are made at the end.

    Raises DataError, ConfigError or CheckpointError on every rank, before anything is written.
    """
    check_sizes(config.network)
    _check_given(config, teacher, student)
    for name in config.stages:
        execution.pieces(getattr(config, name).batch)
    if features is not None:
        config = replace(config, gan=replace(config.gan, features=named(features)))
    dataset = _dataset(config)
    config = replace(
        config,
        data_sha256=_digest(dataset),
        teacher_sha256=_checked("--teacher", teacher, config, load_teacher),
        student_sha256=_checked("--student", student, config, load_student),
    )
    parts = Parts(
        dataset,
        {
            stage: distance_of(config.of_student(stage), execution.device)
            for stage in config.stages
            if stage != "teacher"
        },
        features or (feature_networks(config, dataset, execution.device) if "gan" in config.stages else ()),
    )
    agree("configuration", to_dict(config))
    run = _first(execution, lambda: RunDirectory.open(outdir, config))
    try:
        return _in_directory(config, execution, parts, run, {TEACHER: teacher, STUDENT: student}, keep, report)
    finally:
        if run is not None:
            run.close()


def _in_directory(
    config: RunConfig,
    execution: Execution,
    parts: Parts,
    run: RunDirectory | None,
    given: dict[str, Path | None],
    keep: int | None,
    report: bool,
) -> Path:
    """What is left to do of ``config`` in the directory of ``run``, which is None but on the first rank; its path."""
    path = Path(of_first(str(run.path) if run else None))
    if of_first(run is not None and run.finished):
        _say(execution, f"{path}: already finished; {path / 'report.md'}")
        return path
    _first(execution, lambda: _take_over(path, given))
    _go_on(config, execution, replace(parts, dataset=_to(parts.dataset, execution)), path, run, keep)
    if run is not None and report:
        print("writing the report", flush=True)
        print(write_report(run, parts.dataset, execution.device))
        print(path / "report.md")
    wait_for_all()
    return path


def _go_on(
    config: RunConfig, execution: Execution, parts: Parts, path: Path, run: RunDirectory | None, keep: int | None
) -> None:
    """Every stage, from where the last saved state leaves off."""
    found = _first(execution, lambda: run.last_state() if run else None)
    last = of_first(found and {"path": str(found[0]), "stage": found[1]["stage"], "step": found[1]["step"]})
    state = found[1] if found else (RunDirectory(path, config).read_state(Path(last["path"])) if last else None)
    done = {stage: config.steps(stage) for stage in config.stages}
    if last:
        later = config.stages[config.stages.index(last["stage"]) :]
        done.update(dict.fromkeys(later, 0) | {last["stage"]: last["step"]})
    else:
        done = dict.fromkeys(done, 0)
    _first(execution, lambda: run.rewind_stats(done) if run else None)
    begin = f"going on after step {last['step']} of {last['stage']}" if last else "starting"
    ranks = f", {execution.ranks.size} ranks" if execution.ranks.size > 1 else ""
    _say(execution, f"{path}: {begin} on {execution.device.type}{ranks}")
    for name in config.stages:
        if done[name] >= config.steps(name):
            continue
        regions = Regions(compile=execution.compile, device=execution.device)
        stage = _stage(name, config, execution, parts, regions, path)
        if state and state["stage"] == name:
            stage.load_state(state["weights"])
        _compile(stage, regions, run, done[name])
        run_stage(stage, run, regions.timer, done[name], keep=keep)
        wait_for_all()  # the next stage reads what the first rank has just written


def _stage(name: str, config: RunConfig, execution: Execution, parts: Parts, regions: Regions, path: Path) -> Stage:
    if name == "teacher":
        return TeacherStage(config, parts.dataset, execution, regions)
    files = RunDirectory(path, config)
    teacher = load_teacher(files.teacher, config) if config.of_student(name).solver == "teacher" else None
    if name == "gan" and "ctm" in config.stages:
        student = load_student(files.snapshot("ctm", config.ctm.steps), config)
    elif config.student_sha256:
        student = load_student(path / STUDENT, config)
    else:
        student = fresh_student(config, name, teacher)
    if name == "ctm":
        return CTMStage(config, parts.dataset, execution, regions, student, teacher, parts.distances[name])
    return GANStage(config, parts.dataset, execution, regions, student, teacher, parts.distances[name], parts.features)


def _compile(stage: Stage, regions: Regions, run: RunDirectory | None, start: int) -> None:
    report = measure(stage, regions)
    if report is not None and run is not None:
        print(report, flush=True)
        run.append_stats({"stage": stage.name, "step": start, "compile": vars(report)})


def _check_given(config: RunConfig, teacher: Path | None, student: Path | None) -> None:
    """That files are given for what the stages start from, and for nothing else."""
    stages = ", ".join(config.stages)
    if "teacher" in config.stages:
        for option, given in (("--teacher", teacher), ("--student", student)):
            if given is not None:
                raise ConfigError(f"{option}: expected only without the stage teacher, got {given} for {stages}")
    elif teacher is None and config.needs_teacher:
        raise ConfigError(f"--teacher: expected the teacher's .safetensors for {stages}, got none")
    elif teacher is not None and not config.needs_teacher:
        raise ConfigError(f"--teacher: expected none for {config.ctm.solver}-teaching, got {teacher}")
    elif student is None and config.stages == ("gan",):
        raise ConfigError("--student: expected the .safetensors of a CTM for gan, got none")


def _checked(option: str, path: Path | None, config: RunConfig, load: Callable[[Path, RunConfig], object]) -> str:
    """The digest of a file that ``load`` takes; empty for none."""
    if path is None:
        return ""
    try:
        load(path, config)
    except CheckpointError as error:
        raise CheckpointError(f"{option} {error}") from error
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_over(run: Path, given: dict[str, Path | None]) -> None:
    """Copies of the files given, each whole or absent."""
    for name, source in given.items():
        if source is not None:
            with source.open("rb") as reader:
                atomic_write(run / name, lambda file: shutil.copyfileobj(reader, file))


def _first(execution: Execution, action: Callable[[], T]) -> T | None:
    """What ``action`` returns on the first rank, None on the others; its error on every rank."""
    result, error = None, None
    if execution.ranks.is_first:
        try:
            result = action()
        except (UserError, OSError) as raised:
            error = raised
    message = of_first(None if error is None else str(error))
    if error is not None:
        raise error
    if message is not None:
        raise ConfigError(f"rank 0: {message}")
    return result


def _say(execution: Execution, line: str) -> None:
    if execution.ranks.is_first:
        print(line, flush=True)


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


def _to(dataset: ImageDataset, execution: Execution) -> ImageDataset:
    labels = None if dataset.labels is None else dataset.labels.to(execution.device)
    return replace(dataset, images=dataset.images.to(execution.device), labels=labels)


def _digest(dataset: ImageDataset) -> str:
    digest = hashlib.sha256(dataset.images.numpy().tobytes())
    if dataset.labels is not None:
        digest.update(dataset.labels.numpy().tobytes())
    return digest.hexdigest()
