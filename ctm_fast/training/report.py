"""The report of a finished run: figures, curves, and teacher and student side by side."""

import platform
from typing import Any

import torch

from ctm_fast import __version__, markdown
from ctm_fast.data import ImageDataset
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.pictures import line_plot, save_png
from ctm_fast.training.preview import TEACHER_STEPS, save_comparison
from ctm_fast.training.reference import Figures, Reference
from ctm_fast.training.run_directory import RunDirectory

_COUNT = 1000
_NAMES = {"ctm": "CTM", "gan": "CTM + GAN"}
_LOSSES = ("loss", "ctm_loss", "dsm_loss", "discriminator_loss")


def write_report(run: RunDirectory, dataset: ImageDataset, reference: Reference, device: torch.device) -> str:
    """Write report.json, the pictures and, last, report.md into the run's directory; the table, in Markdown."""
    config = run.config
    rows: list[tuple[str, Figures]] = []
    students = {stage: load_model(run.last_snapshot(stage), device=device)[0] for stage in _students(run)}
    for stage, student in students.items():
        rows += [(_NAMES[stage], reference.figures(student, count=_COUNT, steps=steps)) for steps in (1, 2)]
    teacher = load_model(run.teacher, device=device)[0] if run.teacher.exists() else None
    if teacher is not None:
        rows.append(("teacher, Heun", reference.figures(teacher, count=_COUNT, steps=TEACHER_STEPS)))
        rows.append(("teacher, one Euler step", reference.figures(teacher, count=_COUNT, steps=1)))
    last = next(reversed(students.values()), None)
    if isinstance(last, CTM) and isinstance(teacher, EDMDenoiser):
        save_comparison(teacher, last, config, run.path / "samples.png")

    stats = run.stats()
    for stage in config.stages:
        _save_curves(run, stats, stage)
    floor = reference.floor()
    summary = {
        "ctm_fast": __version__,
        "preset": config.preset,
        "seed": config.seed,
        "machine": _machine(device),
        "samples": _COUNT,
        "classifier_held_out_accuracy": reference.accuracy,
        "frechet_floor": floor,
        "rows": [{"samples": name, **vars(row)} for name, row in rows],
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


def _table(rows: list[tuple[str, Figures]], floor: float) -> str:
    """The rows as a Markdown table."""
    return markdown.table(
        [
            ["samples", "NFE", "recognised", "variance ratio", "Frechet distance"],
            *(
                [name, str(row.nfe), _percent(row.recognised), _number(row.variance_ratio), _number(row.frechet)]
                for name, row in rows
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
