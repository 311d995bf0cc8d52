"""``python -m ctm_fast.sample``: images from a snapshot; from Python, ``from ctm_fast.sample import load``.

Under torchrun the seeds are spread over its ranks, and the files do not depend on how many there are. A run into a
folder or a .npz that was stopped, however it was, goes on by the same command; images of two runs are never mixed.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctm_fast import __version__, runtime
from ctm_fast.distributed import Ranks, finish, start_ranks
from ctm_fast.errors import ConfigError
from ctm_fast.samplers import evaluations
from ctm_fast.serving import Sampler, load
from ctm_fast.serving.labels import LabelRule, labels_of_seeds
from ctm_fast.serving.manifest import Manifest, seeds_text
from ctm_fast.serving.network import load_network
from ctm_fast.serving.outputs import open_output
from ctm_fast.serving.preset import read_preset
from ctm_fast.serving.request import MAX_SEED
from ctm_fast.serving.sampler import MAX_BATCH
from ctm_fast.serving.shards import Pixels, Shard, cut, make_shards

__all__ = ["Sampler", "load"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST = 10_000_000


def main() -> None:
    arguments = _parser().parse_args()
    seeds = parse_seeds("--seeds", arguments.seeds)
    if arguments.preset is not None and arguments.gamma is not None:
        raise ConfigError(f"--gamma: expected none with --preset, which holds its own, got {arguments.gamma}")
    ranks, device = start_ranks(arguments.device)
    try:
        _sample(arguments, seeds, ranks, device)
    finally:
        finish()


def _sample(arguments: argparse.Namespace, seeds: list[int], ranks: Ranks, device: torch.device) -> None:
    sampler, network = load_sampler(arguments, str(device))
    rule = _label_rule(arguments.labels, sampler)
    schedule = None
    if arguments.preset is not None:
        schedule = read_preset(arguments.preset, sampler, steps=arguments.steps, network_sha256=network)
    gamma = arguments.gamma or 0.0
    manifest: Manifest = {
        "ctm_fast": __version__,
        "network_sha256": network,
        "seeds": seeds_text(seeds),
        "labels": rule if rule is None or rule == "random" else seeds_text(rule),
        "steps": arguments.steps,
        "sigmas": None if schedule is None else list(schedule.sigmas),
        "gamma": gamma if schedule is None else schedule.gamma,
        "guidance": arguments.guidance,
        "evaluations": evaluations(
            sampler.model,
            arguments.steps,
            sigmas=None if schedule is None else schedule.sigmas,
            guidance=arguments.guidance,
        ),
        "dtype": arguments.dtype,
        "batch": arguments.batch,
    }
    how: dict[str, Any] = {"steps": arguments.steps, "gamma": gamma}
    if schedule is not None:
        how = {"sigmas": schedule.sigmas, "gamma": schedule.gamma}
    how["guidance"] = arguments.guidance
    output = open_output(arguments.out, manifest, images=len(seeds), ranks=ranks.size)
    shards = cut(seeds, lambda part: labels_of_seeds(part, sampler.num_classes, rule), arguments.batch)
    try:
        make_shards(_maker(sampler, how), shards, output, ranks)
    except OSError as error:
        raise ConfigError(f"--out: expected a place that can be written, got {arguments.out}: {error}") from error
    if ranks.is_first:
        print(arguments.out)


def load_sampler(arguments: argparse.Namespace, device: str | None) -> tuple[Sampler, str]:
    """The sampler of ``arguments`` as :func:`add_sampler_options` has them, and the SHA-256 of its file.

    Errors name the option.
    """
    if not 1 <= arguments.batch <= MAX_BATCH:
        raise ConfigError(f"--batch: expected 1 to {MAX_BATCH}, got {arguments.batch}")
    dtype = DTYPES[arguments.dtype]
    loaded, digest = load_network("--network", arguments.network, device, dtype, threads=arguments.threads)
    return Sampler(loaded.model, loaded.levels, batch=arguments.batch), digest


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """What :func:`load_sampler` reads."""
    add = parser.add_argument
    add("--network", required=True, metavar="FILE", help="a snapshot-*.safetensors, or user/name on the Hub")
    add("--batch", type=int, default=256, help="images that the network makes at once (default: 256)")
    add("--dtype", choices=list(DTYPES), default="float32", help="what the network computes in (default: float32)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, under torchrun the rank's own, else the CPU)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")


def parse_seeds(option: str, text: str) -> list[int]:
    """As :func:`parse_range`, up to 2^63 - 1 and each once."""
    seeds = parse_range(option, text)
    if max(seeds) > MAX_SEED:
        raise ConfigError(f"{option}: expected numbers up to {MAX_SEED}, got {max(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{option}: expected each seed once, got {text!r}")
    return seeds


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


def _label_rule(text: str | None, sampler: Sampler) -> LabelRule:
    if text is None:
        return None
    classes = [0] if text == "random" else parse_range("--labels", text)
    sampler.labels_of(classes, classes)  # those, too, that no seed comes to
    return "random" if text == "random" else classes


def _maker(sampler: Sampler, how: dict[str, Any]) -> Callable[[Shard], Pixels]:
    """What makes a shard's images; the first call checks ``how``."""

    def make(shard: Shard) -> Pixels:
        images = sampler(shard.seeds, labels=shard.labels, output="uint8", **how)
        assert isinstance(images, torch.Tensor)
        return images.numpy()

    return make


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.sample", description=__doc__)
    add_sampler_options(parser)
    add = parser.add_argument
    add("--seeds", default="0-63", help="one image each: 0-63 or 1,5,7 (default: 0-63)")
    add("--steps", type=int, default=1, help="jumps of a CTM; levels of a teacher's solver (default: 1)")
    add("--gamma", type=float, help="of gamma-sampling, 0 to 1 (default: 0, deterministic)")
    add("--guidance", type=float, help="weight of classifier-free guidance, for a model with label dropout")
    add(
        "--preset",
        type=Path,
        metavar="FILE",
        help="levels and gamma for --steps jumps: a search.json of ctm_fast.search",
    )
    add(
        "--labels",
        help="classes, a seed's being the one at its remainder: 0-9; or random, drawn by the seed "
        "(default: seed modulo the number of classes)",
    )
    add("--out", type=Path, required=True, help="a folder of one PNG per seed, a .npz, or a .png for a grid")
    return parser


if __name__ == "__main__":
    runtime.run(main)
