"""``python -m ctm_fast.experiments NAME --preset P``: one of the paper's experiments, as a page of results."""

import shlex
import time
from dataclasses import replace
from pathlib import Path

from ctm_fast import markdown, runtime
from ctm_fast.errors import ConfigError
from ctm_fast.experiments import EXPERIMENTS, Lab, Trainings
from ctm_fast.experiments.cost import estimate
from ctm_fast.experiments.figures import LEAST
from ctm_fast.experiments.lab import text
from ctm_fast.experiments.page import write_page
from ctm_fast.experiments.variants import scaled
from ctm_fast.files import can_write_in
from ctm_fast.training import override, preset
from ctm_fast.training.config import nearest
from ctm_fast.training.execution import Execution
from ctm_fast.training.precision import resolve

_BUDGETS: dict[str, tuple[tuple[int, ...], float]] = {
    "digits": ((0, 1, 2), 1.0),
    "fashion-mnist-16": ((0,), 0.25),
    "fashion-mnist-32": ((0,), 1.0),
}
"""Preset -> seeds and scale by default: all six on digits, or one-step on Fashion-MNIST 16x16, are made for the time
that two CPU cores take in an hour or so; fashion-mnist-32 is for a GPU."""
_ELSE = (0,), 1.0


def main() -> None:
    begin = time.perf_counter()
    arguments = _parser().parse_args()
    if arguments.name not in EXPERIMENTS:
        raise ConfigError(f"experiment: unknown {arguments.name!r}; {nearest(arguments.name, EXPERIMENTS)}")
    experiment = EXPERIMENTS[arguments.name]
    base = preset(arguments.preset)
    if arguments.data is not None:
        base = replace(base, data=replace(base.data, source=arguments.data))
    by_default, scale = _BUDGETS.get(arguments.preset, _ELSE)
    seeds = by_default if arguments.seeds is None else _seeds(arguments.seeds)
    seeds = seeds[: experiment.most_seeds]
    scale = scale if arguments.scale is None else arguments.scale
    if not 0 < scale <= 100:
        raise ConfigError(f"--scale: expected a number above 0 and up to 100, got {scale:g}")
    if arguments.count < LEAST:
        raise ConfigError(f"--count: expected at least {LEAST}, got {arguments.count}")
    base = override(scaled(base, scale), arguments.set)
    runtime.prepare(arguments.threads)
    device = runtime.find_device(arguments.device)
    base = replace(base, precision=resolve(base.precision, device))  # a run is found again by what it computes in
    if arguments.dry_run:
        print(markdown.table(estimate(experiment, base, seeds, arguments.outdir, device)))
        return
    _check_results(arguments.results)
    lab = Lab(Trainings(base, arguments.outdir, Execution(device)), seeds, arguments.count)
    finding = experiment.investigate(lab)
    changes = "".join(f" --set {change}" for change in arguments.set)
    data = "" if arguments.data is None else f" --data {shlex.quote(arguments.data)}"
    command = (
        f"python -m ctm_fast.experiments {arguments.name} --preset {arguments.preset}{data} "
        f"--seeds {','.join(map(str, seeds))} --scale {scale:g} --count {arguments.count}{changes}"
    )
    stem = f"{arguments.name}-{arguments.preset}" + ("" if arguments.data is None else f"-{Path(arguments.data).stem}")
    path = write_page(arguments.results, stem, command, experiment, finding, lab, time.perf_counter() - begin)
    print(text(finding))
    print(path)


def _seeds(written: str) -> tuple[int, ...]:
    parts = written.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds: expected different numbers such as 0,1,2, got {written!r}")
    return tuple(map(int, parts))


def _check_results(folder: Path) -> None:
    """Before any work: that there is a place for what is to be written."""
    there = folder
    while not there.exists():
        there = there.parent
    if not can_write_in(there):
        raise ConfigError(f"--results: expected a directory that can be written to, got {folder}")


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.experiments", description=__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help=", ".join(EXPERIMENTS))
    add("--preset", default="digits", help="what is trained (default: digits)")
    add("--data", metavar="SOURCE", help="as for ctm_fast.train (default: the preset's)")
    add("--seeds", metavar="S,S,...", help="of the runs (default: 0,1,2 for digits, else 0)")
    add("--scale", type=float, help="steps, over the preset's (default: 1; 0.25 for fashion-mnist-16)")
    add("--count", type=int, default=2000, help="samples for each figure (default: 2000)")
    add("--set", action="append", default=[], metavar="A.B=C", help="change one key of the scaled preset")
    add("--outdir", type=Path, default=Path("runs"), help="where run directories are made and found (default: runs)")
    add("--results", type=Path, default=Path("docs/results"), help="where pages are written (default: docs/results)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    add("--dry-run", action="store_true", help="list the runs with what they cost, and stop")
    return parser


if __name__ == "__main__":
    runtime.run(main)
