"""What an experiment works with, and what it finds."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ctm_fast import markdown
from ctm_fast.experiments.figures import Figures, Judge, Spread, spread
from ctm_fast.experiments.trainings import Trainings
from ctm_fast.experiments.variants import Size, Variant
from ctm_fast.pictures import Curve

COLUMNS: dict[str, Callable[[Sequence[Figures]], str]] = {
    "recognised, %": lambda figures: spread(figures, lambda f: 100 * f.recognised).text(),
    "variance ratio": lambda figures: spread(figures, lambda f: f.variance_ratio).text(),
    "in-domain Frechet": lambda figures: spread(figures, lambda f: f.frechet).text(),
    "in-domain KID": lambda figures: spread(figures, lambda f: f.kid).text(),
    "pixel Frechet": lambda figures: spread(figures, lambda f: f.pixel_frechet).text(),
}
"""Figures of a row, over its seeds: head of the column -> text."""


@dataclass(frozen=True)
class Plot:
    """Curves and their axes, for :func:`ctm_fast.pictures.line_plot`."""

    curves: Mapping[str, Curve]
    title: str
    xlabel: str
    ylabel: str
    log_y: bool = True


@dataclass(frozen=True)
class Finding:
    """What came of an experiment.

    Args:
        tables: heading -> rows, the head first.
        plot: the picture.
        conclusions: in plain words what shows and what does not.
        method: how it was measured, sentence by sentence.
        record: everything as plain values.
    """

    tables: Mapping[str, Sequence[Sequence[str]]]
    plot: Plot
    conclusions: Sequence[str]
    method: Sequence[str]
    record: Any


@dataclass
class Lab:
    """The parts of an experiment that do not depend on its question.

    Args:
        trainings: gives the models.
        seeds: of the runs.
        count: samples for each figure.
    """

    trainings: Trainings
    seeds: tuple[int, ...]
    count: int
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    """Row -> figures, one of each seed."""

    @property
    def device(self) -> torch.device:
        """Where models and images are."""
        return self.trainings.execution.device

    @functools.cached_property
    def judge(self) -> Judge:
        """Of the samples."""
        return Judge(self.trainings.dataset, self.count, self.device)

    def measure(self, row: str, sets: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[Figures]:
        """Figures of sets of samples, one of each seed, kept as ``row``."""
        bar = tqdm(sets, total=len(self.seeds), desc=row, unit="seed", leave=False, disable=None)
        self.figures[row] = [self.judge(images, labels) for images, labels in bar]
        return self.figures[row]

    def table(self, first: str, rows: Mapping[str, Sequence[Figures]] | None = None) -> list[list[str]]:
        """A table of rows, all by default, and the floor: what real images have from each other."""
        chosen = self.figures if rows is None else rows
        lines = [[first, *COLUMNS]]
        lines += [[name, *(column(figures) for column in COLUMNS.values())] for name, figures in chosen.items()]
        floor = self.judge.floor
        kernel = floor["kid"].get("floor")
        lines.append(
            [
                f"real, {floor['frechet']['floor_count']} against the others",
                "",
                "",
                f"{floor['frechet']['floor']:.3g}",
                "" if kernel is None else f"{kernel:.3g}",
                "",
            ]
        )
        return lines

    def record(self) -> dict[str, Any]:
        """All figures as plain values."""
        return {
            "extractor": {"name": self.judge.extractor.name, "sha256": self.judge.extractor.sha256}
            | self.judge.extractor.facts,
            "floor": self.judge.floor,
            "seeds": list(self.seeds),
            "count": self.count,
            "rows": {name: [dataclasses.asdict(each) for each in figures] for name, figures in self.figures.items()},
        }

    def frechet(self, row: str) -> Spread:
        """In-domain Frechet distances of ``row`` over seeds."""
        return spread(self.figures[row], lambda figures: figures.frechet)


@dataclass(frozen=True)
class Experiment:
    """A question put to trained models.

    Args:
        title: of its page.
        question: what the paper says, and what is looked at here.
        investigate: makes the finding.
        teacher: whether it needs a teacher.
        variants: students that it trains, of every size.
        sizes: other networks than the preset's; () for that alone.
        most_seeds: how many seeds it takes at most.
        plus_minus: what ± is on its page.
    """

    title: str
    question: str
    investigate: Callable[[Lab], Finding]
    teacher: bool = True
    variants: tuple[Variant, ...] = ()
    sizes: tuple[Size, ...] = ()
    most_seeds: int = 1_000
    plus_minus: str = "the standard deviation from seed to seed"


def text(finding: Finding) -> str:
    """The tables in Markdown, each under its heading."""
    return "\n\n".join(f"### {heading}\n\n{markdown.table(rows)}" for heading, rows in finding.tables.items())
