"""``python -m ctm_fast.search``: the levels and gamma to sample a CTM with at each number of network evaluations.

Schedules are compared by their samples' distance from data, all from the same seeds. Writes ``search.json``, which
``python -m ctm_fast.sample --preset`` reads, ``search.md`` and plots.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ctm_fast import __version__, runtime
from ctm_fast.data import load_dataset
from ctm_fast.data.order import some
from ctm_fast.diffusion.images import to_float
from ctm_fast.diffusion.schedule import karras_sigmas, sampler_sigmas
from ctm_fast.errors import ConfigError, DataError
from ctm_fast.evaluation.data_distance import DataDistance
from ctm_fast.files import can_write_in
from ctm_fast.models import CTM
from ctm_fast.sample import add_sampler_options, load_sampler, parse_range
from ctm_fast.samplers import Trial, search_schedules
from ctm_fast.samplers.search import Score, Sigmas
from ctm_fast.serving import Sampler
from ctm_fast.serving.manifest import seeds_text
from ctm_fast.serving.search_report import PRESET, Validated, best_of, write_search

_FIRST_SEED = 2**40
"""Of the search, far from the seeds that samples are made and judged with."""
_MAX_NFE, _MAX_COUNT, _MAX_POINTS = 64, 1_000_000, 10_000
_REAL = 10_000  # at most this many real images are compared with
_CLASSIFIER_SEED = 0


def main() -> None:
    arguments = _parser().parse_args()
    budgets = parse_range("--nfe", arguments.nfe)
    if min(budgets) < 1 or max(budgets) > _MAX_NFE or len(set(budgets)) < len(budgets):
        raise ConfigError(f"--nfe: expected different numbers in 1..{_MAX_NFE}, got {arguments.nfe!r}")
    gammas = _gammas(arguments.gammas)
    for name, value, least, most in (
        ("--count", arguments.count, 2, _MAX_COUNT),
        ("--points", arguments.points, 2, _MAX_POINTS),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name}: expected {least} to {most}, got {value}")
    _check_out(arguments.out)
    sampler, network = load_sampler(arguments, arguments.device)
    if not isinstance(sampler.model, CTM):
        raise ConfigError(f"--network: expected a CTM, got a teacher: {arguments.network}")
    distance, data = _distance(arguments.data, sampler)
    seeds = list(range(_FIRST_SEED, _FIRST_SEED + arguments.count))
    fresh = [seed + arguments.count for seed in seeds]
    grid = karras_sigmas(arguments.points, sampler.levels).tolist()
    searched = {}
    with tqdm(unit="schedule", disable=None) as bar:
        for nfe in budgets:
            default = sampler_sigmas(nfe, sampler.levels).tolist()
            found = search_schedules(common_score(sampler, distance, seeds, bar.update), default, grid, gammas)
            again = common_score(sampler, distance, fresh, bar.update)
            best, plain = best_of(found), found[0].default
            searched[nfe] = Validated(found, _rescored(plain, again), _rescored(best, again))
    about = {
        "ctm_fast": __version__,
        "network_sha256": network,
        "metric": distance.name,
        "data": data,
        "count": arguments.count,
        "seeds": seeds_text(seeds),
        "validation_seeds": seeds_text(fresh),
        "points": arguments.points,
        "dtype": arguments.dtype,
    }
    try:
        arguments.out.mkdir(exist_ok=True)
        print(write_search(arguments.out, searched, about))
    except OSError as error:
        raise ConfigError(f"--out: expected a place that can be written, got {arguments.out}: {error}") from error
    print(arguments.out / PRESET)


def common_score(sampler: Sampler, distance: DataDistance, seeds: list[int], tick: Callable[[], object]) -> Score:
    """The distance of the samples of ``seeds``, whose starts, noise and classes are the same for every schedule.

    ``tick`` is called for each.
    """
    labels = sampler.labels_of(seeds)

    def score(sigmas: Sigmas, gamma: float) -> float:
        images = sampler(seeds, sigmas=sigmas, gamma=gamma, labels=labels)
        assert isinstance(images, torch.Tensor)
        tick()
        return distance(images)

    return score


def _rescored(trial: Trial, score: Score) -> Trial:
    return replace(trial, score=score(trial.sigmas, trial.gamma))


def _distance(source: str, sampler: Sampler) -> tuple[DataDistance, str]:
    """What tells how far images are from the data, and the data's name."""
    net = sampler.model.net
    labelled = sampler.num_classes > 0
    dataset = load_dataset(source, resolution=net.img_resolution, channels=net.img_channels, labels=labelled)
    if len(dataset.images) < 2:
        raise DataError(f"--data: expected at least 2 images, got {len(dataset.images)} in {source}")
    chosen = some(len(dataset.images), _REAL, _CLASSIFIER_SEED)
    images = to_float(dataset.images[chosen]).to(sampler.device)
    labels = None if dataset.labels is None else dataset.labels[chosen].to(sampler.device)
    return DataDistance(images, labels, num_classes=dataset.num_classes, seed=_CLASSIFIER_SEED), dataset.name


def _gammas(text: str) -> list[float]:
    """0, which is the default of sampling, and the others of ``text``."""
    try:
        gammas = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--gammas: expected numbers such as 0,0.3,1, got {text!r}") from error
    if not all(0 <= gamma <= 1 for gamma in gammas):
        raise ConfigError(f"--gammas: expected numbers in [0, 1], got {text!r}")
    return list(dict.fromkeys([0.0, *gammas]))


def _check_out(out: Path) -> None:
    """Before any work: that there is a place for what is to be written."""
    if not out.parent.is_dir() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out: expected a folder in a directory that exists, got {out}")
    if not can_write_in(out if out.is_dir() else out.parent):
        raise ConfigError(f"--out: expected a directory that can be written to, got {out}")
    if (out / PRESET).exists():
        raise ConfigError(f"--out: expected a folder without a {PRESET}, which took a search to make, got {out}")


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.search", description=__doc__)
    add_sampler_options(parser)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="SOURCE",
        help="digits, fashion-mnist, a .zip, .npz, .tar, .tar.gz, .parquet or directory",
    )
    add("--nfe", default="1,2,4", help="network evaluations: 1,2,4 or 1-4 (default: 1,2,4)")
    add("--gammas", default="0,0.3,0.7,1", help="to be tried beside 0 (default: 0,0.3,0.7,1)")
    add("--count", type=int, default=1000, help="images for each schedule (default: 1000)")
    add("--points", type=int, default=18, help="of the training grid, whose levels are tried (default: 18)")
    add("--out", type=Path, default=Path("search"), help="a folder (default: search)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
