"""Trained models by what they are: found again where they are there, trained where not."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctm_fast.data import ImageDataset, load_dataset
from ctm_fast.experiments.variants import CTM_PLAIN, Size, Variant, student_run, teacher_run
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.training import RunConfig, train
from ctm_fast.training.config import to_dict
from ctm_fast.training.execution import Execution
from ctm_fast.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Trained:
    """A model, the lines of its run's stats.jsonl, and the file that it is from."""

    model: CTM | EDMDenoiser
    stats: list[dict[str, Any]]
    path: Path

    @property
    def seconds(self) -> float:
        """What its steps took, those before an interruption too."""
        return float(sum(line.get("seconds", 0.0) for line in self.stats))

    def late_mean(self, figure: str) -> float:
        """The mean of ``figure`` over the last quarter of its lines; NaN where there are none."""
        values = [line[figure] for line in self.stats if figure in line]
        late = values[-max(1, len(values) // 4) :]
        return sum(late) / len(late) if late else float("nan")


class Trainings:
    """What one experiment trains.

    Args:
        base: the preset at the scale that is asked for.
        outdir: where run directories are made; those of equal configuration that lie there are taken.
        execution: where and how to train.
    """

    def __init__(self, base: RunConfig, outdir: Path, execution: Execution) -> None:
        self.base, self.outdir, self.execution = base, outdir, execution
        self.used: dict[Path, Trained] = {}
        self._paths: dict[str, Path] = {}

    @functools.cached_property
    def dataset(self) -> ImageDataset:
        """What is trained on, on the host."""
        network = self.base.network
        return load_dataset(
            self.base.data.source,
            resolution=network.img_resolution,
            channels=network.img_channels,
            labels=self.base.data.conditional,
        )

    def teacher(self, seed: int, size: Size | None = None) -> Trained:
        """The teacher of ``seed``."""
        return self._train(teacher_run(self._sized(size), seed))

    def student(self, variant: Variant, seed: int, size: Size | None = None) -> Trained:
        """The student of ``seed`` that ``variant`` describes, and before it what it starts from."""
        config = student_run(self._sized(size), seed, variant)
        teacher = self.teacher(seed, size).path if config.needs_teacher else None
        student = None if variant.stage == "ctm" else self.student(CTM_PLAIN, seed, size).path
        return self._train(config, teacher=teacher, student=student)

    @property
    def data_sha256(self) -> str:
        """Of the images and labels, as the runs have it; empty before the first."""
        for directory in self.used:
            return str(json.loads((directory / "config.json").read_text())["config"]["data_sha256"])
        return ""

    def _sized(self, size: Size | None) -> RunConfig:
        return self.base if size is None else replace(self.base, network=size.of(self.base.network))

    def _train(self, config: RunConfig, *, teacher: Path | None = None, student: Path | None = None) -> Trained:
        key = f"{to_dict(config)}"
        if key not in self._paths:
            self._paths[key] = train(
                config, self.outdir, self.execution, teacher=teacher, student=student, keep=1, report=False
            )
        directory = self._paths[key]
        run = RunDirectory(directory, config)
        if directory not in self.used:
            path = run.last_snapshot(config.stages[-1])
            model, _ = load_model(path, device=self.execution.device)
            self.used[directory] = Trained(model, run.stats(), path)
        return self.used[directory]
