"""What a search of schedules leaves: a preset for ``ctm_fast.sample``, a table, and two plots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctm_fast import markdown
from ctm_fast.files import write_text
from ctm_fast.pictures import Curve, line_plot, save_png
from ctm_fast.samplers import Found, Trial
from ctm_fast.serving.preset import FORMAT

PRESET = "search.json"


@dataclass(frozen=True)
class Validated:
    """The search of one budget, and two schedules on seeds that the search has not seen.

    ``default`` is what ``ctm_fast.sample`` does without a preset, ``best`` the best of the search; each with its score
    on the fresh seeds. ``found`` is the search itself, an entry for each gamma.
    """

    found: Sequence[Found]
    default: Trial
    best: Trial

    @property
    def kept(self) -> Trial:
        """The better of the two on the fresh seeds: a search that only fitted its own seeds changes nothing."""
        return min(self.default, self.best, key=lambda trial: trial.score)


def best_of(found: Sequence[Found]) -> Trial:
    """The best trial over all gammas; of equals the first."""
    return min((entry.best for entry in found), key=lambda trial: trial.score)


def write_search(folder: Path, searched: Mapping[int, Validated], about: Mapping[str, Any]) -> str:
    """Write the plots, search.md and, last, search.json into ``folder``; the table, in Markdown.

    Args:
        searched: by the number of network evaluations.
        about: what goes into search.json beside that, among it ``network_sha256``, ``metric``, ``count``.
    """
    gammas = sorted({entry.default.gamma for budget in searched.values() for entry in budget.found})
    metric = str(about["metric"])
    for name, curves, label in (
        ("quality-nfe.png", {f"gamma = {gamma:g}": _over_nfe(searched, gamma) for gamma in gammas}, "NFE"),
        ("quality-gamma.png", {f"NFE {nfe}": _over_gamma(budget) for nfe, budget in searched.items()}, "gamma"),
    ):
        positive = all(score > 0 for _, scores in curves.values() for score in scores)
        picture = line_plot(curves, title="the best levels found", xlabel=label, ylabel=metric, log_y=positive)
        save_png(picture, folder / name)
    table = _table(searched)
    text = _markdown(table, searched, about)
    write_text(folder / "search.md", text)
    entries = {str(nfe): _entry(budget) for nfe, budget in searched.items()}
    preset = json.dumps({"format": FORMAT, **about, "nfe": entries}, indent=2) + "\n"
    write_text(folder / PRESET, preset)
    return table


def _over_nfe(searched: Mapping[int, Validated], gamma: float) -> Curve:
    points = [
        (nfe, entry.best.score)
        for nfe, budget in sorted(searched.items())
        for entry in budget.found
        if entry.best.gamma == gamma or nfe == 1  # one jump is the same at any gamma
    ]
    return [float(nfe) for nfe, _ in points], [score for _, score in points]


def _over_gamma(budget: Validated) -> Curve:
    entries = sorted((entry.best.gamma, entry.best.score) for entry in budget.found)
    return [gamma for gamma, _ in entries], [score for _, score in entries]


def _entry(budget: Validated) -> dict[str, Any]:
    searched = {"default": _trial(budget.found[0].default), "best": _trial(best_of(budget.found))}
    return {
        "sigmas": list(budget.kept.sigmas),
        "gamma": budget.kept.gamma,
        "search": searched,
        "validation": {"default": budget.default.score, "best": budget.best.score},
        "gammas": [{"default": entry.default.score, **_trial(entry.best)} for entry in budget.found],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {"sigmas": list(trial.sigmas), "gamma": trial.gamma, "score": trial.score}


def _table(searched: Mapping[int, Validated]) -> str:
    rows = [["NFE", "γ", "default levels", "best levels", "which"]]
    for nfe, budget in searched.items():
        for entry in budget.found:
            gamma = f"{entry.default.gamma:g}" if nfe > 1 else "any"
            rows.append([str(nfe), gamma, _number(entry.default), _number(entry.best), _levels(entry.best)])
    return markdown.table(rows, words=-1)


def _validation_table(searched: Mapping[int, Validated]) -> str:
    rows = [["NFE", "default", "found", "kept: γ", "levels"]]
    for nfe, budget in searched.items():
        kept = budget.kept
        rows.append([str(nfe), _number(budget.default), _number(budget.best), f"{kept.gamma:g}", _levels(kept)])
    return markdown.table(rows, words=-1)


def _markdown(table: str, searched: Mapping[int, Validated], about: Mapping[str, Any]) -> str:
    lines = [
        "# Levels and γ by number of network evaluations",
        "",
        f"{about['metric']} between {about['count']} samples and {about['data']}, the lower the better; all schedules "
        "share starts and noise. The default levels are those of the Karras schedule.",
        "",
        table,
        "",
        "![quality against NFE](quality-nfe.png)",
        "",
        "![quality against γ](quality-gamma.png)",
        "",
        "On seeds that the search has not seen, the default schedule at γ = 0 and the best of the search; the better "
        "of the two is in the preset:",
        "",
        _validation_table(searched),
        "",
        f"    python -m ctm_fast.sample --network FILE --preset {PRESET} --steps {max(searched)} --out images",
        "",
    ]
    return "\n".join(lines)


def _levels(trial: Trial) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in trial.sigmas)


def _number(trial: Trial) -> str:
    return f"{trial.score:.4g}"
