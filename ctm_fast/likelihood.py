"""``python -m ctm_fast.likelihood``: bits per dimension of real images under a model, and a teacher's beside it."""

import hashlib
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ctm_fast import __version__, runtime
from ctm_fast.data import ImageDataset, epoch_order, load_dataset
from ctm_fast.errors import ConfigError, DataError
from ctm_fast.evaluation.likelihood import Dequantisation
from ctm_fast.evaluation.measure_likelihood import (
    ImageBits,
    Settings,
    error_of_probes,
    mean_and_error,
    measure_likelihood,
    paired_difference,
)
from ctm_fast.evaluation.published_likelihood import Compat
from ctm_fast.evaluation.traces import Probes
from ctm_fast.files import atomic_write, check_output
from ctm_fast.models import CTM
from ctm_fast.serving import Sampler
from ctm_fast.serving.network import load_network

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}]"


def main() -> None:
    arguments = _parser().parse_args()
    settings = _settings(arguments)
    if arguments.out is not None:
        check_output("--out", arguments.out, ".npz")
    runtime.prepare(arguments.threads)
    models, digests = {}, {}
    for name in ("network", "teacher") if arguments.teacher is not None else ("network",):
        models[name], digests[name] = load_network(f"--{name}", getattr(arguments, name), arguments.device)
    if "teacher" in models:
        _check_teacher(models["network"], models["teacher"])
    # An adaptive solver takes the rounding of TF32 for a rough ODE.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    dataset = _dataset(arguments.data, arguments.split, models["network"])
    index = _choose(len(dataset.images), arguments.count, settings.seed)
    found = _measure(models, dataset, index, settings)
    _print(arguments, models, dataset, found, settings)
    if arguments.out is not None:
        _write(arguments, models, digests, dataset, index, found, settings)
        print(arguments.out)


def _settings(arguments: Any) -> Settings:
    if arguments.probes == "exact" and arguments.probe_count is not None:
        raise ConfigError(f"--probe-count: expected none with --probes exact, got {arguments.probe_count}")
    return Settings(
        probes=arguments.probes,
        probe_count=1 if arguments.probe_count is None else arguments.probe_count,
        tolerance=arguments.tolerance,
        dequantisation=arguments.dequantisation or ("none" if arguments.compat else "uniform"),
        compat=arguments.compat,
        seed=arguments.seed,
        batch=arguments.batch,
    )


def _check_teacher(network: Sampler, teacher: Sampler) -> None:
    """That the two give densities of the same images at the same level."""
    for name, wanted, got in (
        ("resolution", network.model.net.img_resolution, teacher.model.net.img_resolution),
        ("channels", network.model.net.img_channels, teacher.model.net.img_channels),
        ("classes", network.num_classes, teacher.num_classes),
        ("sigma_min", network.levels.sigma_min, teacher.levels.sigma_min),
        ("sigma_max", network.levels.sigma_max, teacher.levels.sigma_max),
    ):
        if wanted != got:
            raise ConfigError(f"--teacher: expected {name} {wanted} as of --network, got {got}")


def _dataset(source: str, split: str, sampler: Sampler) -> ImageDataset:
    net = sampler.model.net
    dataset = load_dataset(
        source,
        resolution=net.img_resolution,
        channels=net.img_channels,
        labels=sampler.num_classes > 0,
        split=split,
    )
    if dataset.num_classes > sampler.num_classes:
        raise DataError(
            f"labels: {source}: expected 0 to {sampler.num_classes - 1}, the classes of --network, "
            f"got {dataset.num_classes - 1}"
        )
    return dataset


def _choose(images: int, count: int | None, seed: int) -> NDArray[np.int64]:
    """Which images: all, or ``count`` drawn by the seed, in the order of the data."""
    if count is None:
        return np.arange(images)
    if not 1 <= count <= images:
        raise ConfigError(f"--count: expected 1 to {images}, the images of --data, got {count}")
    return np.sort(epoch_order(images, seed, 0)[:count])


def _measure(
    models: dict[str, Sampler], dataset: ImageDataset, index: NDArray[np.int64], settings: Settings
) -> dict[str, ImageBits]:
    images = dataset.images[index]
    labels = None if dataset.labels is None else dataset.labels[index]
    found = {}
    for name, sampler in models.items():
        with tqdm(total=len(images), desc=name, unit="image", bar_format=_BAR, leave=False, disable=None) as bar:
            found[name] = measure_likelihood(
                sampler.model.denoise,
                images,
                labels,
                index,
                sampler.levels,
                settings,
                device=sampler.device,
                progress=None if bar.disable else partial(_advance, bar),
            )
    return found


def _advance(bar: Any, images: float) -> None:
    bar.update(images - bar.n)


def _print(
    arguments: Any,
    models: dict[str, Sampler],
    dataset: ImageDataset,
    found: dict[str, ImageBits],
    settings: Settings,
) -> None:
    chosen, shape = len(found["network"].bits_per_dim), "x".join(map(str, dataset.images.shape[1:]))
    print(
        f"data: {dataset.name}, split {arguments.split}, {chosen} of {len(dataset.images)} images {shape}, "
        f"{'unconditional' if dataset.labels is None else 'with their labels'}, "
        f"dequantisation {settings.dequantisation}{f', formula {settings.compat}' if settings.compat else ''}"
    )
    for name, sampler in models.items():
        bits = found[name]
        kind = "CTM" if isinstance(sampler.model, CTM) else "EDM denoiser"
        print(f"{name}: {getattr(arguments, name)} ({kind}), bits/dim")
        print(f"  likelihood   {_number(*mean_and_error(bits.bits_per_dim))} over images, {_share(bits, settings)}")
        print(f"  bound (SDE)  {_number(*mean_and_error(bits.bound))} over images and {settings.draws} draws each")
        low, mean, high = bits.evaluations.min(), bits.evaluations.mean(), bits.evaluations.max()
        print(f"  evaluations  {mean:.0f} for each image, {low:.0f} to {high:.0f}, tolerance {settings.tolerance:g}")
    if "teacher" in found:
        difference = paired_difference(found["network"], found["teacher"])
        print(f"network - teacher: {_number(*difference)} bits/dim, on common random numbers")


def _share(bits: ImageBits, settings: Settings) -> str:
    if settings.probes == "exact":
        return "exact trace"
    probes = f"{settings.probe_count} {settings.probes} probe{'' if settings.probe_count == 1 else 's'}"
    if settings.probe_count == 1:
        return f"that of {probes} included"
    return f"± {error_of_probes(bits.probe_error):.4f} over {probes} alone"


def _number(mean: float, error: float) -> str:
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def _write(
    arguments: Any,
    models: dict[str, Sampler],
    digests: dict[str, str],
    dataset: ImageDataset,
    index: NDArray[np.int64],
    found: dict[str, ImageBits],
    settings: Settings,
) -> None:
    """Each image's numbers, ``teacher_`` before the teacher's, and a JSON text that says how they were made."""
    arrays: dict[str, Any] = {"index": index}
    if dataset.labels is not None:
        arrays["labels"] = dataset.labels[index].numpy()
    for name, bits in found.items():
        arrays |= {f"{'teacher_' if name == 'teacher' else ''}{key}": value for key, value in vars(bits).items()}
    provenance: dict[str, Any] = {
        "ctm_fast": __version__,
        "torch": str(torch.__version__),
        "device": str(models["network"].device),
        "data": {
            "source": arguments.data,
            "split": arguments.split,
            "sha256": hashlib.sha256(dataset.images.numpy().tobytes()).hexdigest(),
        },
        "levels": asdict(models["network"].levels),
        **asdict(settings),
    }
    for name in models:
        provenance[name] = {"file": getattr(arguments, name), "sha256": digests[name]}
    arrays["provenance"] = np.array(json.dumps(provenance))
    try:
        atomic_write(arguments.out, lambda file: np.savez_compressed(file, **arrays))
    except OSError as error:
        raise ConfigError(f"--out: expected a place that can be written, got {arguments.out}: {error}") from error


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.likelihood", description=__doc__)
    add = parser.add_argument
    add("--network", required=True, metavar="FILE", help="a snapshot-*.safetensors, or user/name on the Hub")
    add("--data", required=True, help="digits, fashion-mnist, or a file or directory as for training")
    add("--split", default="train", help="train or, where the data have one, test (default: train)")
    add("--teacher", metavar="FILE", help="another snapshot, compared on the same random numbers")
    add("--count", type=int, help="images, drawn by the seed (default: all)")
    add("--tolerance", type=float, default=1e-5, help="of the solver, relative and absolute (default: 1e-5)")
    add("--probes", choices=get_args(Probes), default="rademacher", help="of the trace (default: rademacher)")
    add("--probe-count", type=int, metavar="K", help="probes for each image (default: 1)")
    add(
        "--dequantisation",
        choices=get_args(Dequantisation),
        help="uniform: (x + u) / 128 - 1; none: x / 127.5 - 1 (default: uniform; with --compat none)",
    )
    add(
        "--compat",
        choices=get_args(Compat),
        help="the published formula; with its bug; or its mode without noise (default: ours)",
    )
    add("--batch", type=int, default=64, help="images at once; changes rounding alone (default: 64)")
    add("--seed", type=int, default=0, help="of probes, dequantisation and --count (default: 0)")
    add("--out", type=Path, metavar="FILE.npz", help="each image's numbers, and how they were made")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
