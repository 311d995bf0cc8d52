"""An experiment's page: figures, picture, and in plain words what shows and how it was made."""

import json
from pathlib import Path

from ctm_fast import __version__
from ctm_fast.data import ImageDataset
from ctm_fast.experiments import provenance
from ctm_fast.experiments.lab import Experiment, Finding, Lab, text
from ctm_fast.files import write_text
from ctm_fast.pictures import line_plot, save_png
from ctm_fast.training.config import to_dict


def write_page(
    folder: Path, stem: str, command: str, experiment: Experiment, finding: Finding, lab: Lab, measuring: float
) -> Path:
    """Write STEM.png, STEM.json and, last, STEM.md into ``folder``; the path of that.

    Args:
        command: what makes it again.
        measuring: seconds beside the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = _made(lab, measuring)
    record = {
        "ctm_fast": __version__,
        "command": command,
        "made": made,
        "network": to_dict(lab.trainings.base)["network"],
        "finding": finding.record,
    }
    plot = finding.plot
    picture = line_plot(plot.curves, title=plot.title, xlabel=plot.xlabel, ylabel=plot.ylabel, log_y=plot.log_y)
    save_png(picture, folder / f"{stem}.png")
    write_text(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / f"{stem}.md", _page(stem, command, experiment, finding, lab, made))
    return folder / f"{stem}.md"


def _made(lab: Lab, measuring: float) -> dict[str, object]:
    return {
        "commit": provenance.commit(),
        "machine": provenance.machine(lab.device),
        "load": round(provenance.load(), 2),
        "training_seconds": round(sum(trained.seconds for trained in lab.trainings.used.values()), 1),
        "measuring_seconds": round(measuring, 1),
        "data_sha256": lab.trainings.data_sha256,
    }


def _page(stem: str, command: str, experiment: Experiment, finding: Finding, lab: Lab, made: dict[str, object]) -> str:
    base = lab.trainings.base
    seeds = ", ".join(map(str, lab.seeds))
    spread = f"; ± is {experiment.plus_minus}" if len(lab.seeds) > 1 else ""
    return "\n".join(
        [
            f"# {experiment.title}: {base.preset}",
            "",
            experiment.question,
            "",
            f"![{finding.plot.title}]({stem}.png)",
            "",
            text(finding),
            "",
            "## What shows, and what does not",
            "",
            *(f"- {line}" for line in finding.conclusions),
            "",
            f"{_title(lab.trainings.dataset)} with {_networks(experiment, lab)} and minutes of training: "
            "this shows the method and its order of things, not the paper's quality, which takes its networks, its "
            "data and GPUs.",
            "",
            "## How it was made",
            "",
            f"    {command}",
            "",
            f"- Data: {_title(lab.trainings.dataset)}, sha256 of pixels and labels {str(made['data_sha256'])[:12]}.",
            f"- Seeds {seeds}{spread}.",
            f"- Teacher {base.teacher.steps} steps of {base.teacher.batch}, students {base.ctm.steps} steps of "
            f"{base.ctm.batch} where nothing else is said, distance {base.ctm.distance}.",
            *(f"- {line}" for line in finding.method),
            f"- Commit {made['commit']}; {made['machine']}.",
            f"- {_minutes(made['training_seconds'])} of training in all: runs of the same configuration that were "
            "there are taken and counted, whichever commit made them. "
            f"{_minutes(made['measuring_seconds'])} for the last call; {made['load']} processes wanted each core.",
            "",
        ]
    )


def _title(dataset: ImageDataset) -> str:
    count, _, height, width = dataset.images.shape
    return f"{provenance.data_title(dataset.name)}, {count:,} images of {height}x{width}"


def _networks(experiment: Experiment, lab: Lab) -> str:
    if experiment.sizes:
        return "networks of the table's sizes"
    trained = next(iter(lab.trainings.used.values()))
    return f"a network of {sum(parameter.numel() for parameter in trained.model.parameters()):,} parameters"


def _minutes(seconds: object) -> str:
    return f"{float(str(seconds)) / 60:.1f} min"
