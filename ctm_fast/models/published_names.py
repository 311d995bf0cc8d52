"""The names that published files give to the tensors of our networks, one table for each scheme of names.

EDM's networks and CTM's CIFAR-10 students name a block by resolution and index, under ``model.``; guided-diffusion's
ADM, consistency models' and CTM's ImageNet students number the blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.unet import UNet
from ctm_fast.nn import DownConv2d, UNetBlock, resample_kernel

Places = Iterator[tuple[str, str, str]]


@dataclass(frozen=True)
class Scheme:
    """Our modules' names -> the published ones: outside the blocks, within a block, within its attention."""

    prefix: str
    outside: dict[str, str]
    block: dict[str, str]
    attention: dict[str, str]
    places: Callable[[UNet], Places]
    """For each entry of encoder and decoder: our path, the published one, and the published path of its attention."""
    resample_filters: bool
    """Whether each resampling layer repeats its filter as a buffer ``resample_filter``."""
    interleaved_qkv: bool
    """Whether the rows of qkv are (head, channel, q/k/v), where ours are (q/k/v, head, channel)."""
    transposed: tuple[str, ...] = ()
    """Our modules whose published weight is the transpose of ours."""


def _edm_places(net: UNet) -> Places:
    for path in (f"{part}.{name}" for part in ("enc", "dec") for name in getattr(net, part)):
        yield path, path, path


def _guided_places(net: UNet) -> Places:
    for index, name in enumerate(net.enc):
        yield f"enc.{name}", f"input_blocks.{index}.0", f"input_blocks.{index}.1"
    index, behind = -1, 0
    for name, block in net.dec.items():
        if "_in" in name:
            yield f"dec.{name}", f"middle_block.{2 * int(name[-1])}", "middle_block.1"
        elif "_block" in name:
            index, behind = index + 1, 1 if block.attention is None else 2
            yield f"dec.{name}", f"output_blocks.{index}.0", f"output_blocks.{index}.1"
        else:  # what doubles the resolution stands behind the last block of the level below
            yield f"dec.{name}", f"output_blocks.{index}.{behind}", ""


_EDM = Scheme(
    prefix="model.",
    outside={
        "embedding": "map_noise",
        "embedding.map_label": "map_label",
        "embedding.map_augment": "map_augment",
        "embedding.map_layer0": "map_layer0",
        "embedding.map_layer1": "map_layer1",
        "embedding.map_layer0_s": "map_layer0_s",
        "embedding.map_layer1_s": "map_layer1_s",
        "out_norm": "out_norm",
        "out_conv": "out_conv",
    },
    block={name: name for name in ("norm0", "conv0", "affine", "affine_s", "norm1", "conv1", "skip")},
    attention={name: name for name in ("norm2", "qkv", "proj")},
    places=_edm_places,
    resample_filters=True,
    interleaved_qkv=True,
)
_SONG = replace(_EDM, outside=_EDM.outside | {"out_norm": "dec.{size}_aux_norm", "out_conv": "dec.{size}_aux_conv"})
_GUIDED = Scheme(
    prefix="",
    outside={
        "embedding.map_label": "label_emb",
        "embedding.map_layer0": "time_embed.0",
        "embedding.map_layer1": "time_embed.2",
        "embedding.map_layer0_s": "time_embed_s.0",
        "embedding.map_layer1_s": "time_embed_s.2",
        "out_norm": "out.0",
        "out_conv": "out.2",
    },
    block={
        "norm0": "in_layers.0",
        "conv0": "in_layers.2",
        "affine": "emb_layers.1",
        "affine_s": "emb_layers_s.1",
        "norm1": "out_layers.0",
        "conv1": "out_layers.3",
        "skip": "skip_connection",
    },
    attention={"norm2": "norm", "qkv": "qkv", "proj": "proj_out"},
    places=_guided_places,
    resample_filters=False,
    interleaved_qkv=False,
    transposed=("embedding.map_label",),
)
SCHEMES = {"ddpmpp": _SONG, "ncsnpp": _SONG, "dhariwal": _EDM, "adm": _GUIDED}
"""Architecture -> how its published files name things."""


def published_names(net: UNet) -> dict[str, str]:
    """Our name of each tensor of ``net`` -> its published name, in the order of ``net.state_dict()``.

    Raises CheckpointError for a tensor that no published network of this architecture has.
    """
    scheme = SCHEMES[net.config.arch]
    size = f"{net.img_resolution}x{net.img_resolution}"
    modules = {ours: theirs.format(size=size) for ours, theirs in scheme.outside.items()}
    for ours, theirs, attention in scheme.places(net):
        modules[ours] = theirs
        modules |= {f"{ours}.{mine}": f"{theirs}.{name}" for mine, name in scheme.block.items()}
        modules |= {f"{ours}.attention.{mine}": f"{attention}.{name}" for mine, name in scheme.attention.items()}
    names = {}
    for name in net.state_dict():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            raise CheckpointError(f"{name}: no published network of architecture {net.config.arch} has this tensor")
        names[name] = f"{scheme.prefix}{modules[module]}.{leaf}"
    return names


def published_filters(net: UNet) -> dict[str, Tensor]:
    """The buffers that published files hold besides, and which follow from the architecture: name -> value."""
    scheme = SCHEMES[net.config.arch]
    if not scheme.resample_filters:
        return {}
    taps: dict[str, tuple[int, ...]] = {}
    for name, module in net.named_modules():
        if isinstance(module, DownConv2d):
            taps[name] = module.taps
        elif isinstance(module, UNetBlock) and module.resample is not None:
            taps |= dict.fromkeys((f"{name}.conv0", f"{name}.skip"), module.style.taps)
    return {f"{scheme.prefix}{name}.resample_filter": resample_kernel(value) for name, value in taps.items()}
