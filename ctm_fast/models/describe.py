"""What a published file holds, read off the names and shapes of its tensors."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from ctm_fast.errors import CheckpointError, reason
from ctm_fast.models.config import NETWORKS, NetworkConfig, check_fits, check_sizes
from ctm_fast.models.unet import ARCHITECTURES

PREFIX = "model."
"""Of EDM's wrapper; files of a bare network lack it."""
_SIGMA_DATA = 0.5
_TELLTALES = {
    "time_embed.0.weight": "adm",
    "map_noise.freqs": "ncsnpp",
    "out_conv.weight": "dhariwal",
    "map_layer0.weight": "ddpmpp",
}
"""A tensor -> the architecture that has it, and none of those before."""
_ALIASES = {"channels_per_head": "head_channels"}
"""EDM's names of fields -> ours."""
_PUBLISHED = {config.arch: config for config in NETWORKS.values()}

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Description:
    """A network and its wrapper; ``str()`` says it in one line."""

    network: NetworkConfig
    s_branch: bool
    """Whether it is a CTM student; else it is an EDM denoiser."""
    sigma_data: float
    assumed: tuple[str, ...]
    """The fields that neither the tensors nor the configuration told: they are as in the published network."""

    def __str__(self) -> str:
        network = self.network
        size = network.img_resolution
        kind = "CTM student" if self.s_branch else "denoiser"
        labels = f"{network.label_dim} classes" if network.label_dim else "unconditional"
        text = (
            f"{network.arch} {kind}, {size}x{size}x{network.img_channels}, {labels}, "
            f"{network.model_channels} channels x {network.channel_mult}, {network.num_blocks} blocks a level, "
            f"attention at {network.attn_resolutions}, sigma_data {self.sigma_data}"
        )
        if network.arch == "adm" and not self.s_branch:
            text += "; taken for EDM's: a consistency model has the same tensors, and other scalings near sigma_min"
        if not self.assumed:
            return text
        values = asdict(network) | {"sigma_data": self.sigma_data}
        return f"{text}; assumed: " + ", ".join(f"{name} {values[name]}" for name in self.assumed)


def describe(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | NetworkConfig | None = None) -> Description:
    """The network of a published state dict.

    Names and shapes tell the architecture and all sizes but a few, which ``config`` tells or which are assumed to be
    those of the published network: ``dropout``, ``head_channels``, ``label_dropout``, ``sigma_data`` and, in
    guided-diffusion's scheme, ``img_resolution``.

    Args:
        tensors: name -> tensor; only shapes are read.
        config: fields of :class:`NetworkConfig` and ``sigma_data``, flat or under ``network``, by our names or EDM's;
            other keys of a published configuration are left alone.

    Raises CheckpointError if it is none of the published networks, or is not what ``config`` says.
    """
    names = {name.removeprefix(PREFIX): tensor.shape for name, tensor in tensors.items()}
    arch = next((arch for name, arch in _TELLTALES.items() if name in names), None)
    if arch is None:
        raise CheckpointError(
            f"tensors: expected a published U-Net of {', '.join(ARCHITECTURES)}, got {len(names)} tensors such as "
            f"{sorted(names)[:3]}"
        )
    told = _told(config)
    try:
        read = _read_guided(names, told) if arch == "adm" else _read_edm(names, arch)
        return _combine(arch, names, told, read)
    except CheckpointError:
        raise
    except Exception as error:  # names and shapes of a foreign file may mislead at any depth
        raise CheckpointError(
            f"tensors: expected those of a network of architecture {arch}, got {reason(error)}"
        ) from error


def _told(config: Mapping[str, Any] | NetworkConfig | None) -> dict[str, Any]:
    """The fields that ``config`` gives, by our names."""
    if config is None:
        return {}
    if isinstance(config, NetworkConfig):
        return asdict(config)
    nested = config.get("network", {})
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"config: expected a mapping under network, got {type(nested).__name__}")
    ours = {field.name for field in fields(NetworkConfig)} | {"sigma_data"}
    values = {_ALIASES.get(key, key): value for key, value in {**config, **nested}.items()}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in ours}


def _combine(arch: str, names: Shapes, told: Mapping[str, Any], read: Mapping[str, Any]) -> Description:
    read = {"arch": arch, **read}
    values = {"sigma_data": _SIGMA_DATA, **asdict(_PUBLISHED[arch]), **told, **read}
    sizes = [values["img_resolution"] >> level for level in range(len(read["channel_mult"]))]
    for key, value in read.items():
        wanted = told.get(key, value)
        if key == "attn_resolutions":  # a configuration may list some that the network does not have
            wanted = tuple(size for size in sizes if size in wanted)
        if wanted != value:
            raise CheckpointError(f"{key}: expected {wanted!r} as configured, got tensors of {value!r}")
    sigma_data = float(values.pop("sigma_data"))
    if not (math.isfinite(sigma_data) and sigma_data > 0):
        raise CheckpointError(f"sigma_data: expected a positive number, got {sigma_data}")
    network = NetworkConfig(**values)
    try:
        check_sizes(network)
        check_fits(network, len(names), sum(math.prod(shape) for shape in names.values()))
    except ValueError as error:
        raise CheckpointError(f"tensors: {error}") from error
    return Description(
        network=network,
        s_branch=any(name.startswith(("map_layer0_s.", "time_embed_s.")) for name in names),
        sigma_data=sigma_data,
        assumed=tuple(name for name in (*values, "sigma_data") if name not in read and name not in told),
    )


def _read_edm(names: Shapes, arch: str) -> dict[str, Any]:
    sizes = _numbers(names, r"enc\.(\d+)x\1_block0\.conv0\.weight")[::-1]
    top = f"enc.{sizes[0]}x{sizes[0]}"
    channels = names["map_layer0.weight"][1] // ARCHITECTURES[arch].noise_mult
    return {
        "img_resolution": sizes[0],
        "img_channels": names[f"{top}_conv.weight"][1],
        "label_dim": names["map_label.weight"][1] if "map_label.weight" in names else 0,
        "augment_dim": names["map_augment.weight"][1] if "map_augment.weight" in names else 0,
        "model_channels": channels,
        "channel_mult": tuple(names[f"enc.{size}x{size}_block0.conv0.weight"][0] // channels for size in sizes),
        "num_blocks": len(_numbers(names, rf"{re.escape(top)}_block(\d+)\.conv0\.weight")),
        "attn_resolutions": tuple(size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in names),
    }


def _read_guided(names: Shapes, told: Mapping[str, Any]) -> dict[str, Any]:
    # Blocks are numbered through: a level ends where the decoder has what doubles the resolution.
    ups = _numbers(names, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")
    blocks = ups[0] if ups else _numbers(names, r"output_blocks\.(\d+)\.0\.in_layers\.0\.weight")[-1]
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(len(ups) + 1)]
    channels = names["time_embed.0.weight"][1]
    size = told.get("img_resolution", _PUBLISHED["adm"].img_resolution)
    return {
        "img_channels": names["input_blocks.0.0.weight"][1],
        "label_dim": names["label_emb.weight"][0] if "label_emb.weight" in names else 0,
        "augment_dim": 0,
        "model_channels": channels,
        "channel_mult": tuple(names[f"{block}.0.in_layers.2.weight"][0] // channels for block in first),
        "num_blocks": blocks,
        "attn_resolutions": tuple(
            size >> level for level, block in enumerate(first) if f"{block}.1.qkv.weight" in names
        ),
    }


def _numbers(names: Shapes, pattern: str) -> list[int]:
    """What the group of ``pattern`` matches among the names, in order."""
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))
