"""``python -m ctm_fast.sample``: images from a snapshot; from Python, ``from ctm_fast.sample import load``."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import torch

from ctm_fast import runtime
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.files import atomic_write
from ctm_fast.pictures import image_grid, save_png
from ctm_fast.serving import Sampler, load

__all__ = ["Sampler", "load"]

_MOST = 10_000_000


def main() -> None:
    arguments = _parser().parse_args()
    seeds = parse_range("--seeds", arguments.seeds)
    labels = None if arguments.labels is None else parse_range("--labels", arguments.labels)
    _check_out(arguments.out)
    runtime.prepare(arguments.device, arguments.threads)
    try:
        sampler = load(arguments.network, device=arguments.device)
    except CheckpointError as error:
        raise CheckpointError(f"--network {error}") from error
    if labels is not None:
        labels = list(itertools.islice(itertools.cycle(labels), len(seeds)))
    images = sampler(seeds, steps=arguments.steps, gamma=arguments.gamma, labels=labels, output="uint8")
    assert isinstance(images, torch.Tensor)
    _write(arguments.out, images.cpu().numpy(), seeds, sampler.labels_of(seeds, labels))
    print(arguments.out)


def parse_range(option: str, text: str) -> list[int]:
    """``0-63``, ``1,5,7`` or a mixture, as a list; ConfigError naming the option."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(f"{option}: expected numbers and ranges such as 0-63 or 1,5,7, got {text!r}")
        if last - first >= _MOST - len(numbers):
            raise ConfigError(f"{option}: expected at most {_MOST} numbers, got {text!r}")
        numbers += range(first, last + 1)
    return numbers


def _check_out(out: Path) -> None:
    """Before any work: that there is a place for what is to be written."""
    if out.suffix not in (".png", ".npz", ""):
        raise ConfigError(f"--out: expected a .png, a .npz or a folder, got {out}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: expected a place in a directory that exists, got {out}")
    if out.exists() and out.is_dir() != (out.suffix == ""):
        raise ConfigError(
            f"--out: expected a {out.suffix or 'folder'}, got {'a folder' if out.is_dir() else 'a file'}: {out}"
        )
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        raise ConfigError(f"--out: expected a directory that can be written to, got {out}")


def _write(out: Path, images: np.ndarray, seeds: list[int], labels: list[int] | None) -> None:
    """A grid (.png), arrays ``arr_0`` and ``arr_1`` (.npz), or a folder of one PNG per seed."""
    if out.suffix == ".npz":
        arrays = {"arr_0": images, "seeds": np.array(seeds)}
        if labels is not None:
            arrays["arr_1"] = np.array(labels)
        atomic_write(out, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    elif out.suffix == ".png":
        columns = 10 if len(images) % 10 == 0 else max(1, round(len(images) ** 0.5))
        save_png(image_grid(images, columns=columns, scale=max(1, 32 // images.shape[1])), out)
    else:
        out.mkdir(exist_ok=True)
        for image, seed in zip(images, seeds, strict=True):
            save_png(image_grid(image[None], columns=1), out / f"seed{seed:06d}.png")


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.sample", description=__doc__)
    add = parser.add_argument
    add("--network", type=Path, required=True, metavar="FILE", help="a snapshot-*.safetensors")
    add("--seeds", default="0-63", help="one image each: 0-63 or 1,5,7 (default: 0-63)")
    add("--steps", type=int, default=1, help="jumps of a CTM; levels of a teacher's solver (default: 1)")
    add("--gamma", type=float, default=0.0, help="of gamma-sampling, 0 to 1 (default: 0, deterministic)")
    add("--labels", help="classes, used in turn: 0-9 (default: seed modulo the number of classes)")
    add("--out", type=Path, required=True, help="a .png for a grid, a .npz, or a folder of one PNG per seed")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
