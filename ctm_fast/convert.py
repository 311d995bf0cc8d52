"""``python -m ctm_fast.convert``: published weights to a model of ctm_fast, and back to the published names."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

from ctm_fast import runtime
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.files import atomic_write, check_output
from ctm_fast.models import (
    NETWORKS,
    NetworkConfig,
    describe,
    from_published,
    load_model,
    save_model,
)
from ctm_fast.models.convert import published_views
from ctm_fast.models.published import OPENAI, read_published
from ctm_fast.models.safetensors_file import write_safetensors


def main() -> None:
    arguments = _parser().parse_args()
    source, destination = arguments.source, arguments.destination
    check_output("DST", destination, ".safetensors", sources=[source])
    if arguments.to == "published" and arguments.ema is not None:
        raise ConfigError(f"--ema: expected none with --to published, got {arguments.ema}")
    try:
        if arguments.to == "published":
            convert_to_published(source, destination)
        else:
            convert_from_published(choose(source, arguments.ema), destination)
    except OSError as error:
        raise ConfigError(f"DST: expected a place that can be written, got {destination}: {error}") from error
    print(destination)


def choose(source: Path, ema: str | None) -> Path:
    """The file to read: ``source`` itself, or in the directory of a run of sony/ctm the average of rate ``ema``.

    Of several such files ``ema_<rate>_<step>.pt`` it is that of the highest step. Raises ConfigError naming the option.
    """
    if not source.is_dir():
        if ema is not None:
            raise ConfigError(f"--ema: expected a directory of ema_*.pt as SRC, got {source}")
        return source
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in source.iterdir():
        match = re.fullmatch(r"ema_([0-9.]{1,20})_([0-9]{1,18})\.pt", path.name)
        if match:
            found.setdefault(match[1], []).append((int(match[2]), path))
    if ema not in found:
        there = f"one of {', '.join(sorted(found))}" if found else "a directory with files ema_<rate>_<step>.pt"
        raise ConfigError(f"--ema: expected {there}, got {ema} for {source}")
    files = sorted(found[ema])
    if len(files) > 1:
        print(f"steps {', '.join(str(step) for step, _ in files)}: the highest is taken")
    return files[-1][1]


def convert_from_published(source: Path, destination: Path) -> None:
    """Write the model in a published file to ``destination``, and print what it is and under which licence."""
    published = read_published(source)
    try:
        description = describe(published.shapes, published.config)
        model = from_published(published.tensors, published.config, shapes=published.shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    metadata = {
        "config": {"levels": asdict(Levels())},  # all published models are of the same range of levels
        "preset": preset_of(model.net.config),
        "source": {"file": source.name, "sha256": published.sha256, "publisher": published.publisher},
        "licence": published.licence,
    }
    save_model(destination, model, model.net.config, metadata)
    print(f"{source}: {description}")
    print(f"licence: {_line(published.licence)}")
    if published.publisher == OPENAI:
        print(
            "note: taken for an EDM denoiser; a consistency model of openai's has the same tensors, but other "
            "coefficients, which end at sigma_min: at sigma it is off by about sigma_min / sigma"
        )


def convert_to_published(source: Path, destination: Path) -> None:
    """Write the weights of a model of ctm_fast to ``destination`` under the published names, and print its licence."""
    model, metadata = load_model(source)
    header = {"config": json.dumps({**asdict(model.net.config), "sigma_data": model.sigma_data})}
    if "licence" in metadata:
        header["licence"] = str(metadata["licence"])
    tensors = published_views(model)
    atomic_write(destination, lambda file: write_safetensors(file, tensors, header))
    print(f"licence: {_line(str(metadata.get('licence', 'that of whoever trained the model')))}")


def preset_of(network: NetworkConfig) -> str | None:
    """The published network of that architecture and those sizes, whatever its labels and regularisation."""
    for name, known in NETWORKS.items():
        ours = {field: getattr(known, field) for field in ("label_dim", "dropout", "label_dropout", "augment_dim")}
        if replace(network, **ours) == known:
            return name
    return None


def _line(text: str) -> str:
    """What a file says, as one line that leaves the terminal alone."""
    return "".join(character if character.isprintable() else " " for character in text)


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.convert", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="EDM's .pkl, a .pt, a .safetensors, or a directory of ema_*.pt")
    add("destination", type=Path, metavar="DST", help="the .safetensors to write")
    add("--ema", metavar="RATE", help="which average, if SRC is a directory: 0.999")
    add("--to", choices=["ctm_fast", "published"], default="ctm_fast", help="whose names (default: ctm_fast)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
