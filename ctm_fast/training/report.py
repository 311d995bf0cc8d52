"""The report of a finished run: figures, curves, and teacher and student side by side."""

import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctm_fast import __version__, markdown
from ctm_fast.data import ImageDataset
from ctm_fast.diffusion.images import to_float
from ctm_fast.evaluation.class_variance import within_class_variance_ratio
from ctm_fast.evaluation.classifier import accuracy, train_classifier
from ctm_fast.evaluation.frechet import half_half_floor, pixel_frechet
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.pictures import line_plot, save_png
from ctm_fast.samplers import evaluations
from ctm_fast.training.preview import TEACHER_STEPS, samples, save_comparison
from ctm_fast.training.run_directory import RunDirectory

_COUNT = 1000
_NAMES = {"ctm": "CTM", "gan": "CTM + GAN"}
_LOSSES = ("loss", "ctm_loss", "dsm_loss", "discriminator_loss")
_REAL = 10_000  # at most this many real images are compared with


@dataclass(frozen=True)
class Figures:
    """One row of the table; a figure that the data do not allow is None."""

    samples: str
    nfe: int
    recognised: float | None
    variance_ratio: float | None
    frechet: float


def write_report(run: RunDirectory, dataset: ImageDataset, device: torch.device) -> str:
    """Write report.json, the pictures and, last, report.md into the run's directory; the table, in Markdown."""
    config = run.config
    chosen = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(config.seed))
    chosen = chosen[:_REAL].sort().values.to(device)  # of a large set a sample: it may be stored class by class
    real, labels = to_float(dataset.images[chosen]), None if dataset.labels is None else dataset.labels[chosen]
    classifier, held_out = None, None
    if labels is not None:
        classifier, held_out = train_classifier(real, labels, num_classes=dataset.num_classes, seed=config.seed)

    def figures(name: str, model: CTM | EDMDenoiser, steps: int) -> Figures:
        images, asked = samples(model, config, _COUNT, steps=steps)
        return _figures(name, evaluations(model, steps), to_float(images), asked, real, labels, classifier)

    rows = []
    students = {stage: load_model(run.last_snapshot(stage), device=device)[0] for stage in _students(run)}
    for stage, student in students.items():
        rows += [figures(_NAMES[stage], student, 1), figures(_NAMES[stage], student, 2)]
    teacher = load_model(run.teacher, device=device)[0] if run.teacher.exists() else None
    if teacher is not None:
        rows += [figures("teacher, Heun", teacher, TEACHER_STEPS), figures("teacher, one Euler step", teacher, 1)]
    last = next(reversed(students.values()), None)
    if isinstance(last, CTM) and isinstance(teacher, EDMDenoiser):
        save_comparison(teacher, last, config, run.path / "samples.png")

    stats = run.stats()
    for stage in config.stages:
        _save_curves(run, stats, stage)
    floor = half_half_floor(real, config.seed)
    summary = {
        "ctm_fast": __version__,
        "preset": config.preset,
        "seed": config.seed,
        "machine": _machine(device),
        "samples": _COUNT,
        "classifier_held_out_accuracy": held_out,
        "frechet_floor": floor,
        "rows": [vars(row) for row in rows],
        "stages": {stage: _stage_summary(stats, stage) for stage in config.stages},
    }
    table = _table(rows, floor)
    network = run.last_snapshot(config.stages[-1])
    run.write_json("report.json", summary)
    run.write_text("report.md", _markdown(summary, table, dataset, last is not None, teacher is not None, network.name))
    return table


def _students(run: RunDirectory) -> list[str]:
    """The run's stages that train a student."""
    return [stage for stage in run.config.stages if stage in _NAMES]


def _machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    return f"{where}, {threads} CPU thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def _figures(
    name: str,
    nfe: int,
    images: Tensor,
    asked: Tensor | None,
    real: Tensor,
    labels: Tensor | None,
    classifier: torch.nn.Module | None,
) -> Figures:
    conditional = asked is not None and labels is not None and classifier is not None
    varied = conditional and bool((torch.bincount(labels, minlength=int(asked.max()) + 1)[asked.unique()] >= 2).all())  # type: ignore[union-attr,arg-type]
    return Figures(
        samples=name,
        nfe=nfe,
        recognised=accuracy(classifier, images, asked) if conditional else None,  # type: ignore[arg-type]
        variance_ratio=within_class_variance_ratio(images, asked, real, labels) if varied else None,  # type: ignore[arg-type]
        frechet=pixel_frechet(images, real),
    )


def _stage_summary(stats: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    lines = [line for line in stats if line["stage"] == stage]
    steps = [line for line in lines if "seconds" in line]
    seconds = sum(line["seconds"] for line in steps)
    in_teacher = sum(line.get("teacher_seconds", 0.0) for line in steps)
    rates = sorted(line["images_per_second"] for line in steps)
    return {
        "steps": max((line["step"] for line in steps), default=0),
        "seconds": seconds,
        "images_per_second_median": rates[len(rates) // 2] if rates else None,
        "teacher_share": in_teacher / seconds if in_teacher else None,
        "compile": [line["compile"] for line in lines if "compile" in line],
    }


def _save_curves(run: RunDirectory, stats: list[dict[str, Any]], stage: str) -> None:
    lines = [line for line in stats if line["stage"] == stage and "seconds" in line]
    curves = {
        name: ([line["step"] for line in lines if name in line], [line[name] for line in lines if name in line])
        for name in _LOSSES
        if any(name in line for line in lines)
    }
    picture = line_plot(curves, title=f"{run.config.preset}: {stage}", xlabel="step", ylabel="loss", log_y=True)
    save_png(picture, run.path / f"loss-{stage}.png")


def _table(rows: list[Figures], floor: float) -> str:
    """The rows as a Markdown table."""
    return markdown.table(
        [
            ["samples", "NFE", "recognised", "variance ratio", "Frechet distance"],
            *(
                [row.samples, str(row.nfe), _percent(row.recognised), _number(row.variance_ratio), _number(row.frechet)]
                for row in rows
            ),
            ["real, half against half", "", "", "", _number(floor)],
        ]
    )


def _markdown(
    summary: dict[str, Any], table: str, dataset: ImageDataset, student: bool, teacher: bool, network: str
) -> str:
    lines = [
        f"# {summary['preset']}, seed {summary['seed']}",
        "",
        f"ctm_fast {summary['ctm_fast']} on {summary['machine']}. Data: {dataset.name}, {len(dataset.images)} images "
        f"of {dataset.images.shape[-1]}x{dataset.images.shape[-1]}. It shows the method, not the quality.",
        "",
    ]
    if student and teacher:
        lines += ["Left the teacher at 35 evaluations, right the student in one step, from the same noise:", ""]
        lines += ["![teacher and student](samples.png)", ""]
    lines += [f"{summary['samples']} samples each{', classes in turn' if dataset.num_classes else ''}:", "", table, ""]
    if summary["classifier_held_out_accuracy"] is not None:
        lines += [
            "- **recognised**: as the class asked for, by a small classifier trained on the real images "
            f"(seed {summary['seed']}), which is right on {_percent(summary['classifier_held_out_accuracy'])} "
            "of those held out;",
            "- **variance ratio**: of the pixels within a class, over that of the real images; class means, "
            "a denoiser's answer to pure noise, would have 0;",
        ]
    lines += [
        "- **Frechet distance**: between the Gaussians of the pixels of samples and real images; it is not an FID.",
        "",
        "More of them, from the directory that holds this report:",
        "",
        f"    python -m ctm_fast.sample --network {network} --seeds 0-99 --steps {1 if student else TEACHER_STEPS} "
        "--out more.png",
        "",
    ]
    for stage, figures in summary["stages"].items():
        lines += [f"## {stage}", "", f"{figures['steps']} steps in {_duration(figures['seconds'])}"]
        if figures["images_per_second_median"] is not None:
            lines[-1] += f", {figures['images_per_second_median']:.0f} images/s (median)"
        lines[-1] += "."
        if figures["teacher_share"] is not None:
            lines[-1] += f" {_percent(figures['teacher_share'])} of the time went into the teacher."
        for report in figures["compile"]:
            lines += [
                "",
                f"--compile: {report['eager']:.0f} images/s without, {report['compiled']:.0f} with "
                f"({'; '.join(report['regions'])}); {report['compile_seconds']:.1f} s to compile, "
                + (
                    f"paid back after {report['break_even']} steps."
                    if report["break_even"] is not None
                    else "not paid back here."
                ),
            ]
        lines += ["", f"![loss of {stage}](loss-{stage}.png)", ""]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
