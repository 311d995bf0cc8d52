"""``python -m ctm_fast.evaluate``: how near samples are to real images, and with what that was measured."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ctm_fast import __version__, runtime
from ctm_fast.data import ImageDataset, load_dataset
from ctm_fast.data.decode import Misfit, decode
from ctm_fast.data.images import Arrays
from ctm_fast.data.sources import open_source
from ctm_fast.diffusion.images import to_uint8
from ctm_fast.distributed import Ranks, finish, start_ranks
from ctm_fast.errors import ConfigError, DataError
from ctm_fast.evaluation import extractors
from ctm_fast.evaluation.extractors import Extractor
from ctm_fast.evaluation.measure import METRICS, check_metrics, compare, summarise, warnings
from ctm_fast.evaluation.moments_file import StoredMoments, has_moments, read_moments, write_moments
from ctm_fast.files import check_output, write_text
from ctm_fast.models.features.inception import is_torchscript
from ctm_fast.sample import parse_seeds
from ctm_fast.serving.manifest import beside, seeds_text
from ctm_fast.serving.network import load_network
from ctm_fast.serving.request import check_plan

_STORED = "as stored"
_ROUNDED = "127.5 x + 127.5 to nearest, halves to even"


@dataclass(frozen=True)
class Images:
    """Images uint8 of one size [C, H, W]; ``read`` gives those of an index as [b, C, H, W]; ``facts`` go on record."""

    count: int
    shape: tuple[int, int, int]
    read: Callable[[Sequence[int]], Tensor]
    facts: dict[str, Any]


def main() -> None:
    arguments = _parser().parse_args()
    metrics = METRICS if arguments.metrics is None else tuple(arguments.metrics.split(","))
    check_metrics(metrics)
    _check_arguments(arguments)
    runtime.prepare(arguments.threads)
    ranks, device = start_ranks(arguments.device)
    try:
        _evaluate(arguments, metrics, ranks, device)
    finally:
        finish()


def _evaluate(arguments: Any, metrics: Sequence[str], ranks: Ranks, device: torch.device) -> None:
    samples = _samples(arguments, device)
    dataset, stored = _reference(arguments, samples)
    if dataset is None and arguments.save_stats is not None:
        raise ConfigError(f"--save-stats: expected a --reference with images, got the moments {arguments.reference}")
    extractor = _extractor(arguments, samples, dataset, device)
    if stored is not None and dataset is not None and extractor.name != "inception":
        stored = None  # ADM's batches have images besides, which every extractor can take
    if stored is not None and not arguments.force:
        stored.check(extractor)
    made = summarise(extractor, _batches(samples, arguments.batch, ranks, "samples"), samples.count, metrics)
    real, reference = None, None
    if dataset is not None:
        real = _of_dataset(dataset, device)
        batches = _batches(real, arguments.batch, ranks, "reference")
        reference = summarise(extractor, batches, real.count, metrics, samples=samples.count)
    record = {
        "ctm_fast": __version__,
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "resize": extractor.resize,
            "dimensions": len(made.moments.mean),
            **extractor.facts,
        },
        "samples": {"count": samples.count, **samples.facts},
        "reference": _reference_facts(real, stored, arguments.split),
        "forced": arguments.force,
        "warnings": warnings(made, reference, stored),
        "metrics": compare(made, reference, stored, metrics),
    }
    if not ranks.is_first:
        return
    if arguments.save_stats is not None and reference is not None:
        kept = {"extractor": record["extractor"], "reference": record["reference"]}
        write_moments(arguments.save_stats, reference.moments, reference.spatial, kept)
    if arguments.out is not None:
        text = json.dumps(record, indent=2) + "\n"
        write_text(arguments.out, text)
    print(_text(record, extractor))


def _check_arguments(arguments: Any) -> None:
    """Before any work: that what is asked for fits together and can be written."""
    if (arguments.samples is None) == (arguments.network is None):
        raise ConfigError("--samples: expected either --samples or --network")
    if arguments.batch < 1:
        raise ConfigError(f"--batch: expected a positive number of images, got {arguments.batch}")
    name, _, data = arguments.extractor.partition(":")
    if name not in extractors.NAMES or (data and name != "indomain"):
        raise ConfigError(f"--extractor: expected one of {', '.join(extractors.NAMES)}, got {arguments.extractor!r}")
    if name in ("inception", "dinov2") and arguments.weights is None:
        raise ConfigError(f"--weights: expected the file of {name}, of which nothing is downloaded, got none")
    if name == "indomain" and arguments.weights is not None:
        raise ConfigError("--weights: expected none for indomain, which is trained on the spot")
    if arguments.out is not None:
        check_output("--out", arguments.out, ".json")
    if arguments.save_stats is not None:
        read = [Path(source) for source in (arguments.samples, arguments.reference) if source is not None]
        check_output("--save-stats", arguments.save_stats, ".npz", sources=read, of="--samples and --reference")


def _samples(arguments: Any, device: torch.device) -> Images:
    if arguments.network is not None:
        return _of_network(arguments, device)
    try:
        size = _resolution(arguments.samples)
        images = _of_dataset(load_dataset(arguments.samples, resolution=size, labels=False), device)
    except DataError as error:
        raise DataError(f"--samples: {error}") from error
    seeds = _seeds(Path(arguments.samples).resolve())
    return replace(images, facts={**images.facts, "seeds": seeds_text(seeds)}) if len(seeds) == images.count else images


def _seeds(source: Path) -> list[int]:
    """Those that ``python -m ctm_fast.sample`` left in a .npz or beside a folder; none where it did not."""
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as file:
            return file["seeds"].tolist() if "seeds" in file.files else []
    if not source.is_dir() or not beside(source).is_file():
        return []
    try:
        return parse_seeds("seeds", json.loads(beside(source).read_text())["seeds"])
    except (AttributeError, KeyError, TypeError, ValueError):  # another program's file of that name
        return []


def _resolution(source: str) -> int:
    """The height of the first image."""
    with open_source(source, resolution=None, labels=False, split="train") as found:
        if isinstance(found, Arrays):
            shape = found.pixels.shape
            return int(shape[1]) if len(shape) == 4 else 0
        try:
            return decode(next(iter(found.files))).height
        except Misfit as misfit:
            raise DataError(f"data: {found.path}: cannot take {misfit.got}") from misfit


def _of_network(arguments: Any, device: torch.device) -> Images:
    seeds = parse_seeds("--seeds", arguments.seeds)
    sampler, sha256 = load_network("--network", arguments.network, device)
    check_plan(sampler.model, sampler.levels, arguments.steps, arguments.gamma, None, None)
    net = sampler.model.net

    def read(index: Sequence[int]) -> Tensor:
        images = sampler([seeds[i] for i in index], steps=arguments.steps, gamma=arguments.gamma)
        assert isinstance(images, Tensor)
        finite = images.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            broken = seeds[index[int((~finite).nonzero()[0])]]
            raise DataError(f"--network: {arguments.network}: the image of seed {broken} is not finite")
        return to_uint8(images)

    facts = {
        "source": arguments.network,
        "sha256": sha256,
        "seeds": seeds_text(seeds),
        "steps": arguments.steps,
        "gamma": arguments.gamma,
        "rounding": _ROUNDED,
    }
    return Images(len(seeds), (net.img_channels, net.img_resolution, net.img_resolution), read, facts)


def _reference(arguments: Any, samples: Images) -> tuple[ImageDataset | None, StoredMoments | None]:
    """Real images, moments, or both, as ADM's reference batches have them."""
    source = arguments.reference
    stored = read_moments(source) if has_moments(source) else None
    if stored is not None:
        with np.load(source, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                return None, stored
    labels = arguments.extractor in ("indomain", f"indomain:{source}")
    return _dataset("--reference", source, samples, labels=labels, split=arguments.split), stored


def _dataset(option: str, source: str, like: Images, *, labels: bool, split: str = "train") -> ImageDataset:
    """Real images of the samples' size."""
    channels, height, _ = like.shape
    try:
        return load_dataset(source, resolution=height, channels=channels, labels=labels, split=split)
    except DataError as error:
        raise DataError(f"{option}: {error}") from error


def _of_dataset(dataset: ImageDataset, device: torch.device) -> Images:
    images = dataset.images
    digest = hashlib.sha256(f"{list(images.shape)}".encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    channels, height, width = images.shape[1:]
    facts = {"source": dataset.name, "sha256": digest.hexdigest(), "rounding": _STORED}
    return Images(len(images), (channels, height, width), lambda index: images[list(index)].to(device), facts)


def _extractor(arguments: Any, samples: Images, dataset: ImageDataset | None, device: torch.device) -> Extractor:
    name, _, data = arguments.extractor.partition(":")
    if name == "inception":
        if is_torchscript(arguments.weights):
            print(f"{arguments.weights} is TorchScript, which holds code: it is run", file=sys.stderr)
        return extractors.inception(arguments.weights, device)
    if name == "dinov2":
        return extractors.dinov2(arguments.weights, device)
    if name == "efflite0":
        return extractors.efficientnet_lite0(arguments.weights, device)
    if dataset is None or dataset.labels is None:
        if not data:
            raise ConfigError("--extractor: expected indomain:DATA where the reference has no images, got indomain")
        dataset = _dataset("--extractor", data, samples, labels=True)
    assert dataset.labels is not None
    images, labels = dataset.images.to(device), dataset.labels.to(device)
    return extractors.in_domain(images, labels, num_classes=dataset.num_classes, data=dataset.name)


def _batches(images: Images, batch: int, ranks: Ranks, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the batches, with progress on rank 0."""
    batch = min(batch, -(-images.count // ranks.size))  # or the last ranks would have none
    starts = range(ranks.rank * batch, images.count, ranks.size * batch)
    for start in tqdm(starts, desc=name, unit="batch", disable=None if ranks.is_first else True):
        index = range(start, min(start + batch, images.count))
        yield torch.tensor(index), images.read(index)


def _reference_facts(images: Images | None, stored: StoredMoments | None, split: str) -> dict[str, Any]:
    facts: dict[str, Any] = {} if images is None else {"count": images.count, **images.facts, "split": split}
    if stored is not None:
        said = {} if stored.record is None else stored.record["reference"]
        facts["moments"] = {"source": str(stored.path), "sha256": stored.sha256, "count": stored.count, "of": said}
    return facts


def _text(record: dict[str, Any], extractor: Extractor) -> str:
    """The record for people: one line each for what was compared with what, and one for each number."""
    lines = [
        f"{part:<10} " + ", ".join(f"{key} {value}" for key, value in _flat(record[part]) if value != {})
        for part in ("extractor", "samples", "reference")
    ]
    if record["forced"]:
        lines.append("forced     numbers of another extractor or resize are compared: they mean nothing on their own")
    lines += [f"warning    {text}" for text in record["warnings"]]
    lines.append(f"\n{'':<26}{'value':>22}   real against real")
    for metric, found in record["metrics"].items():
        title = extractor.title(metric)
        if isinstance(found, str):
            lines.append(f"{title:<26}{'-':>22}   {found}")
        elif metric == "neighbours":
            floor = found["floor"] or {}
            for name in ("precision", "recall", "density", "coverage"):
                lines.append(_line(name, found[name], None, floor.get(name), None, found["floor_count"]))
        elif metric == "kid":
            error, floor_error = found["standard_error"], found["floor_standard_error"]
            lines.append(_line(title, found["value"], error, found["floor"], floor_error, found["floor_count"]))
        elif metric == "inception-score":
            lines.append(_line(title, found["value"], found["deviation"], found["reference"], None, None))
        else:
            lines.append(_line(title, found["value"], None, found["floor"], None, found["floor_count"]))
    return "\n".join(lines)


def _line(
    title: str, value: float, error: float | None, floor: float | None, floor_error: float | None, count: int | None
) -> str:
    of = f"  (n = {count})" if count is not None else ""
    return f"{title:<26}{_number(value, error):>22}   {_number(floor, floor_error)}{of}"


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if error is None else f"{value:.6g} ± {error:.2g}"


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.evaluate", description=__doc__)
    add = parser.add_argument
    add(
        "--samples", metavar="DIR|FILE", help="a folder of images, a .npz, a .zip: any form that --data of training has"
    )
    add("--network", metavar="FILE", help="a snapshot-*.safetensors, or user/name on the Hub, to sample instead")
    add("--seeds", default="0-49999", help="of the network's samples (default: 0-49999)")
    add("--steps", type=int, default=1, help="of the network's samples (default: 1)")
    add("--gamma", type=float, default=0.0, help="of the network's samples (default: 0)")
    add("--reference", required=True, metavar="DATA", help="real images, as --data of training, or moments in a .npz")
    add("--split", default="train", help="of the reference, where it has two: train or test (default: train)")
    add(
        "--extractor",
        default="efflite0",
        help="efflite0 (default), inception, dinov2, indomain: a classifier trained on the reference, or indomain:DATA",
    )
    add("--weights", type=Path, metavar="FILE", help="the extractor's; inception and dinov2 need it")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all)")
    add("--out", type=Path, metavar="FILE.json", help="where to write all that is printed")
    add("--save-stats", type=Path, metavar="FILE.npz", help="where to write the reference's moments, for --reference")
    add("--force", action="store_true", help="compare moments of another extractor or resize all the same")
    add("--batch", type=int, default=64, help="images at once (default: 64)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
