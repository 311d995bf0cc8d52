"""``python -m benchmarks.plot``: a picture of each machine's results, ``docs/benchmarks-<machine>.png``.

One bar for each way to run an op: its share of the ceiling that was measured in the same process, the bandwidth of a
large copy (of attention, the rate of a large product). Each op at the largest size that was timed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.figures import DIRECTIONS, Case, headlines
from benchmarks.processes import ROOT
from benchmarks.recording import RESULTS, file_name
from ctm_fast.errors import ConfigError
from ctm_fast.runtime import run as run_program

COLOURS = {"cpp": "#1b6ca8", "triton": "#5bb5e0", "sdpa": "#7a5ba8", "eager": "#c9c9c9", "compiled": "#8a8a8a"}
LABELS = {
    "cpp": "ours, C++",
    "triton": "ours, Triton",
    "sdpa": "PyTorch's fused attention",
    "eager": "PyTorch, eager",
    "compiled": "PyTorch, compiled",
}
OTHERS = "#d9a441"
"""The colour of a way that is not in the table."""
BAR = 0.8
"""Of the height of a row, by all its bars."""


def draw(content: dict[str, Any]) -> Figure:
    """The figures of one file of results. ConfigError where no op was timed."""
    chosen = {direction: headlines(content["results"], direction) for direction in DIRECTIONS}
    if not any(chosen.values()):
        raise ConfigError(f"{file_name(content['machine'])}: expected figures of at least one op, got none")
    rows = sum(max(1, len(case.ways)) for cases in chosen.values() for case in cases)
    figure = Figure(figsize=(9, 1.9 + 0.2 * rows + 0.2 * sum(map(len, chosen.values()))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [direction for direction in DIRECTIONS if chosen[direction]]
    heights = [sum(len(case.ways) + 1 for case in chosen[direction]) for direction in panels]
    every_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, direction in zip(every_axes, panels, strict=True):
        _panel(axes, chosen[direction], direction)
    every_axes[-1].set_xlabel("share of the ceiling (what a copy of the same bytes would reach), longer is better")
    shown = {way for cases in chosen.values() for case in cases for way in case.ways}
    ways = [*(way for way in LABELS if way in shown), *sorted(shown - set(LABELS))]
    handles = [every_axes[0].barh(0, 0, color=COLOURS.get(way, OTHERS)) for way in ways]
    names = [LABELS.get(way, way) for way in ways]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    machine = content["machine"]
    name = machine.get("GPU 0", f"{machine['CPU']}, {machine['threads'].split()[0]} thread").partition(", sm")[0]
    figure.suptitle(f"ctm_fast on {name}, torch {content['versions']['torch']}")
    return figure


def _panel(axes: Axes, cases: list[Case], direction: str) -> None:
    at, ticks, names = 0.0, [], []
    for case in cases:
        ways = [*(way for way in COLOURS if way in case.ways), *sorted(set(case.ways) - set(COLOURS))]
        for place, way in enumerate(ways):
            figures = case.ways[way]
            axes.barh(at + place, figures["share"], height=0.9, color=COLOURS.get(way, OTHERS))
            axes.text(
                figures["share"] + 0.008,
                at + place,
                f"{figures['median seconds'] * 1e6:,.0f} µs",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        ticks.append(at + (len(ways) - 1) / 2)
        names.append(f"{case.op}\n{case.size}")
        at += len(ways) + 1
    axes.set_yticks(ticks, names, fontsize=9)
    axes.invert_yaxis()
    axes.set_title(direction, loc="left", fontsize=10)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_xlim(0, max(1.0, *(figures["share"] for case in cases for figures in case.ways.values())) + 0.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def picture(results: Path) -> Path:
    """Where the picture of a file of results belongs."""
    return ROOT / "docs" / f"benchmarks-{results.stem}.png"


def identity(content: dict[str, Any]) -> str:
    """What a picture says in its file of the results it was drawn from."""
    return f"{content['commit']}, {content['date']}"


def save(content: dict[str, Any], path: Path) -> None:
    draw(content).savefig(path, metadata={"Description": identity(content)})


def main() -> None:
    files = [Path(word) for word in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    for file in files:
        save(json.loads(file.read_text()), picture(file))
        print(f"wrote {picture(file)}")


if __name__ == "__main__":
    run_program(main)
